"""Whole documents put into blocks: the padding that is left and the time it takes, against two plain ways.

    python benchmarks/packing.py [--documents 1000000] [--room 1024] [--repeats 3]

Sizes are drawn with a seed: spread evenly up to the block's, or log-normal as lengths of documents are, cut at the
block's. "In order" fills a block until the next document does not fit. "Piece by piece" is best-fit decreasing too,
with a sorted list of rooms and a bisection for each piece: it packs as well, one at a time. What a packing is worth is
measured the same way for all: the part of the blocks that is padding. No block may hold too much.
"""

import argparse
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Any

import numpy as np
from corpora import alternate, hardware, header, limit_threads, median, row
from numpy.typing import NDArray
from records import Records, add_json_argument

from cbtm.train.packing import pack

OURS, IN_ORDER, PIECES = "cbtm", "in order", "best-fit decreasing, piece by piece"
EVEN, SHORT = "even", "log-normal"
GOAL_S, GOAL_PADDING = 1.0, 0.0015


def sizes_of(kind: str, count: int, room: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    if kind == EVEN:
        return rng.integers(1, room + 1, size=count)
    return np.clip(rng.lognormal(5, 1, size=count).astype(np.int64), 1, room)  # a median of 148


def ours(kind: str, count: int, room: int) -> Callable[[], Any]:
    sizes = sizes_of(kind, count, room)
    return lambda: pack(sizes, room)


def in_order(kind: str, count: int, room: int) -> Callable[[], Any]:
    sizes = sizes_of(kind, count, room).tolist()

    def work() -> NDArray[np.int64]:
        blocks, block, left = [], -1, 0
        for size in sizes:
            if size > left:
                block, left = block + 1, room
            left -= size
            blocks.append(block)
        return np.array(blocks)

    return work


def pieces(kind: str, count: int, room: int) -> Callable[[], Any]:
    sizes = sizes_of(kind, count, room)

    def work() -> NDArray[np.int64]:
        blocks, n_blocks = np.empty(len(sizes), np.int64), 0
        open_blocks: list[tuple[int, int]] = []  # by room
        for place in np.argsort(-sizes, kind="stable").tolist():
            size = int(sizes[place])
            tightest = bisect_left(open_blocks, (size, -1))
            if tightest < len(open_blocks):
                left, block = open_blocks.pop(tightest)
            else:
                left, block, n_blocks = room, n_blocks, n_blocks + 1
            blocks[place] = block
            if left > size:
                insort(open_blocks, (left - size, block))
        return blocks

    return work


def padding_of(blocks: NDArray[np.int64], sizes: NDArray[np.int64], room: int) -> float:
    """Part of all blocks that no piece fills.

    Raises:
        SystemExit: If a block holds more than it can.
    """
    held = np.bincount(blocks, weights=sizes)
    if held.max() > room or held.min() == 0:
        raise SystemExit(f"blocks of {room} hold {held.min():.0f} to {held.max():.0f}")
    return float(1 - held.sum() / (room * len(held)))


def compare(kind: str, args: argparse.Namespace, records: Records) -> None:
    case = f"{args.documents:,} documents, sizes {kind}, blocks of {args.room:,}"
    sizes = sizes_of(kind, args.documents, args.room)
    contenders = {OURS: (ours,), IN_ORDER: (in_order,), PIECES: (pieces,)}
    settings = (kind, args.documents, args.room)
    runs = alternate({name: (*work, *settings) for name, work in contenders.items()},
                     repeats=args.repeats, limit_s=args.limit)  # fmt: skip
    for name, of_one in runs.items():
        run = median(of_one)
        padding = float("nan") if run.error else padding_of(run.value, sizes, args.room)
        row(kind, name, run.error or f"{run.seconds:.3f}", f"{run.cpu_seconds:.3f}", f"{100 * padding:.4f} %")
        records.measured(case, name, of_one, is_ours=name == OURS, note=f"{100 * padding:.4f} % padding")
        if name == OURS:
            found = f"{run.seconds:.2f} s, {100 * padding:.4f} %"
            met = not run.error and run.seconds < GOAL_S and padding <= GOAL_PADDING
            records.goal(
                f"{case}: < {GOAL_S:g} s and at most {100 * GOAL_PADDING:g} % padding", met, run.error or found
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--room", type=int, default=1024, metavar="N", help="tokens of a block")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="longest work of one contender")
    add_json_argument(parser)
    args = parser.parse_args()
    threads = limit_threads(1)
    print(f"{hardware('numpy')}; {threads}; median of {args.repeats}\n")
    header("sizes", "", "s", "CPU s", "padding")
    records = Records(args.json)
    for kind in (EVEN, SHORT):
        compare(kind, args, records)


if __name__ == "__main__":
    main()
