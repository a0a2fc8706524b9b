"""The machine that reads pickles: data as Python reads them, records for objects, one error for the rest.

Hand-written pickles are spelled as opcodes: K is a one-byte integer, c a name, R a call, b a state, . the end.
"""

import collections
import os
import pickle
import struct
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm.cluster.unpickle import PERSISTENT_ID, Name, Record, read_pickle, shown
from cbtm.errors import DataError

PROTOCOLS = [2, 3, 4, 5]
ORDERED_DICT = Name("collections", "OrderedDict")
CALL = b"ccollections\nOrderedDict\n)R"


class Point:
    """A class of this file, as some library has its own."""


def read(content, *names, **options):
    return read_pickle(memoryview(content), names, source="some.pkl", **options)[0]


def refused(content, *names, **options):
    with pytest.raises(DataError) as caught:
        read(content, *names, **options)
    assert str(caught.value).startswith("some.pkl: byte ")
    return str(caught.value)


def plain(value):
    """`value` with its memoryviews as bytes."""
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


# --- data ---

DATA = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=5) | st.lists(inner, max_size=5).map(tuple) | st.dictionaries(st.text("ab"), inner)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(DATA, st.sampled_from(PROTOCOLS))
def test_data_are_those_that_were_pickled(value, protocol):
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [4, 5])
def test_sets_are_those_that_were_pickled(protocol):
    value = {"some": {"a", "b"}, "none": set(), "frozen": frozenset({"c"})}
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("size", [0, 3, 300, 70_000])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_bytes_are_views_of_the_file(protocol, size):
    content = pickle.dumps([b"x" * size], protocol)
    (found,) = read(content)
    assert bytes(found) == b"x" * size
    assert found.obj is content


def test_thousands_of_memoized_items_are_read_back():
    words = [f"word{number}" for number in range(3000)]
    for protocol in PROTOCOLS:
        assert read(pickle.dumps([words, words[::-1], words], protocol)) == [words, words[::-1], words]


def test_a_list_may_contain_itself():
    loop: list = []
    loop.append(loop)
    found = read(pickle.dumps(loop, 4))
    assert found[0] is found
    assert shown(found) == "a list of 1"


def test_several_pickles_follow_one_another():
    content = memoryview(pickle.dumps(1, 2) + pickle.dumps("two", 4) + b"rest")
    one, end = read_pickle(content, [], source="some.pkl")
    two, end = read_pickle(content, [], source="some.pkl", start=end)
    assert (one, two, bytes(content[end:])) == (1, "two", b"rest")


# --- objects ---


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_object_becomes_a_record_of_its_attributes(protocol):
    point, name = Point(), Name(__name__, "Point")
    point.x, point.y = 1, [2]
    found = read(pickle.dumps(point, protocol), name)
    assert (type(found), found.name, found.arguments, found.state) == (Record, name, (), {"x": 1, "y": [2]})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_object_in_two_places_is_one_record(protocol):
    point = Point()
    found = read(pickle.dumps([point, point], protocol), Name(__name__, "Point"))
    assert found[0] is found[1]


def test_a_call_becomes_a_record_and_is_not_made():
    name = Name("posix" if os.name == "posix" else "nt", "system")
    found = read(b"\x80\x02c%s\nsystem\nX\x05\0\0\0false\x85R." % name.module.encode(), name)
    assert (found.name, found.arguments, found.state) == (name, ("false",), None)


def test_a_persistent_id_becomes_a_record_only_where_it_is_expected():
    content = b"\x80\x02K\x07Q."
    found = read(content, persistent_ids=True)
    assert (found.name, found.arguments) == (PERSISTENT_ID, (7,))
    assert "points to something outside of it" in refused(content)


class Calls:
    """Pickled, it asks for a call."""

    def __init__(self, function, *arguments):
        self.wanted = function, arguments

    def __reduce__(self):
        return self.wanted


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch hacked",), f"{os.system.__module__}.system"),
        (eval, ("open('hacked', 'w')",), "eval"),
        (exec, ("open('hacked', 'w')",), "exec"),
        (getattr, ("", "join"), "getattr"),
        (__import__, ("os",), "__import__"),
        (collections.namedtuple, ("A", "b"), "collections.namedtuple"),
    ],
)
def test_a_name_that_is_not_expected_is_refused_before_it_is_run(
    function, arguments, name, protocol, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    message = refused(pickle.dumps(Calls(function, *arguments), protocol), ORDERED_DICT)
    assert name in message
    assert "it was not run, do not trust this file" in message
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_expected_as_a_whole():
    assert "collections.OrderedDict.fromkeys" in refused(b"\x80\x04ccollections\nOrderedDict.fromkeys\n.", ORDERED_DICT)
    assert "collections.abc.OrderedDict" in refused(b"\x80\x04ccollections.abc\nOrderedDict\n.", ORDERED_DICT)
    assert "the file uses ccollections.OrderedDict" in refused(b"\x80\x04cccollections\nOrderedDict\n.", ORDERED_DICT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02" + CALL + b")R.", "calls a collections.OrderedDict with (), which is no name"),
        (b"\x80\x02X\x01\0\0\0a)R.", "calls 'a' with"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01R.", "with 1, which is no name with a tuple"),
        (b"\x80\x02" + CALL + b"K\x01bK\x02b.", "sets the state of a collections.OrderedDict, which is no new object"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "sets the state of collections.OrderedDict"),
        (b"\x80\x02}}b.", "sets the state of a dict of 0"),
        (b"\x80\x02" + CALL + b"X\x01\0\0\0aK\x01s.", "adds items to a collections.OrderedDict as if it were a dict"),
        (b"\x80\x02)K\x01a.", "adds items to () as if it were a list"),
        (b"\x80\x04](K\x01\x90.", "as if it were a set"),
        (b"\x80\x04K\x01K\x02\x93.", "has a name that is not a text"),
    ],
)
def test_objects_are_made_from_names_and_tuples_only(content, message):
    assert message in refused(content, ORDERED_DICT)


# --- hostile values ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with b''"),
        (b"<!DOCTYPE html>", "begins with b'<!', which is no pickle of protocol 2 to 5"),
        (b"(dp0\n.", "which is no pickle of protocol 2 to 5"),
        (b"\x80\x06N.", "which is no pickle of protocol 2 to 5"),
        (b"\x80\x02", "ends in the middle of a pickle"),
        (b"\x80\x02.", "takes a value from an empty stack"),
        (b"\x80\x02K\x01t.", "ends a group that was not begun"),
        (b"\x80\x02}(X\x01\0\0\0au.", "has a key without a value"),
        (b"\x80\x02h\x00.", "reads memo slot 0 of 0"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "uses memo slot 2147483647 after 0 slots"),
        (b"\x80\x02X\x02\0\0\0\xff\xff.", "has a text that is not UTF-8"),
        (b"\x80\x02i__main__\nPoint\n.", "has the opcode b'i', which no such file holds"),
        (b"\x80\x02\x82\x01.", "has the opcode b'\\x82'"),  # EXT1: a registered extension
        (b"\x80\x05\x97.", "has the opcode b'\\x97'"),  # NEXT_BUFFER: outside of the file
        (b"\x80\x02c" + b"a" * 500 + b"\nb\n.", "has a name without an end within 200 bytes"),
        (b"\x80\x04\x8a\xff" + b"\x01" * 300, "has an integer of 255 bytes, above the limit of 32"),
        (b"\x80\x04\x8b\xff\xff\xff\x7f", "has an integer of 2147483647 bytes"),
        (b"\x80\x02G\0\0.", "announces 8 bytes where 3 are left"),
    ],
)
def test_what_is_no_such_pickle_is_refused(content, message):
    assert message in refused(content)


@pytest.mark.parametrize("opcode", [b"\x8e", b"\x96", b"\x8d"])  # bytes, bytearray, text
@pytest.mark.parametrize("length", [100, 2**40, 2**63, 2**64 - 1])
def test_a_length_beyond_the_end_is_refused_before_anything_is_allocated(opcode, length):
    content = b"\x80\x05" + opcode + struct.pack("<Q", length) + b"few"
    tracemalloc.start()
    message = refused(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"announces {length} bytes where 3 are left" in message
    assert peak < 100_000


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04}(" + b")" + b"\x85" * 100_000 + b"Nu.",  # ((((…)))): its hash recurses until the stack is full
        b"\x80\x04}()" + b"\x94h\0\x86" + b"".join(b"\x94h%c\x86" % n for n in range(1, 60)) + b"Nu.",  # 2**60 leaves
        b"\x80\x04\x8f("
        + b"".join(b"\x8a\x10" + (n * (2**61 - 1)).to_bytes(16, "little") for n in range(50))
        + b"\x90.",
        b"\x80\x04(K\x01\x91.",
    ],
    ids=["deep", "exponential", "colliding", "frozen"],
)
def test_only_texts_are_hashed(content):
    started = time.monotonic()
    message = refused(content)
    assert "as a key of a dict or a member of a set; only texts can be" in message
    assert time.monotonic() - started < 5


def test_a_deep_value_is_read_and_thrown_away_without_recursion():
    depth = 300_000
    found = read(b"\x80\x02)" + b"\x85" * depth + b".")
    for _ in range(depth):
        (found,) = found
    assert found == ()


def test_the_number_of_containers_and_of_instructions_is_limited(monkeypatch):
    monkeypatch.setattr("cbtm.cluster.unpickle._MOST_CONTAINERS", 1000)
    assert "has more than 1000 lists, tuples, dicts and objects" in refused(b"\x80\x02" + b"]" * 1001 + b".")
    assert "has more than 1000 lists" in refused(b"\x80\x02" + b"(" * 1001 + b".")
    monkeypatch.setattr("cbtm.cluster.unpickle._MOST_OPERATIONS", 5000)
    assert read(b"\x80\x02" + b"N" * 4999 + b".") is None
    assert "has more than 5000 instructions" in refused(b"\x80\x02" + b"N" * 5000 + b".")


def test_what_is_shown_of_a_value_is_short_and_printable():
    assert shown("\x1b[31m" + "x" * 10_000) == ascii("\x1b[31m" + "x" * 75 + "…")
    assert shown(Name("os\n", "system")) == "os\\n.system"
    assert shown((1, "a", 2.5)) == "(1, 'a', 2.5)"
    assert shown({"a": 1}) == "a dict of 1"
    assert shown(Record(ORDERED_DICT, ())) == "a collections.OrderedDict"
    assert len(shown(Name("m" * 200, "n" * 200))) < 100
