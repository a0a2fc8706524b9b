"""Pieces of routed text as the page writes them."""

from typing import Any

from hand_made_result import make_full_result

from cbtm.merge.routing_section import kept_text, routed_documents, routing_legend

TERMS = {0: ["def", "self", "return", "class"], 3: ["court", "appeal"]}


def result_of(*documents: list[tuple[str, int, float]]) -> dict[str, Any]:
    return {"routing": [{"sp_id": "a|1", "cluster": 0, "pieces": [list(piece) for piece in one]} for one in documents]}


def test_pieces_keep_their_text_and_say_where_the_expert_changes():
    first, second = routed_documents(make_full_result(), TERMS)
    assert "".join(piece["lead"] + piece["text"] for piece in first["pieces"]) == (
        "def f(x):\n    return the court\tof appeal"
    )
    assert [piece["cluster"] for piece in first["pieces"]] == [0, 3, 0]
    assert [piece["level"] for piece in first["pieces"]] == [3, 0, 2]  # weights 0.91, 0.35, 0.65 at 0.4, 0.6, 0.8
    assert first["pieces"][1]["title"] == "expert 3: court, appeal; weight 0.35"
    assert (first["sp_id"], second["sp_id"], first["cut"]) == ("valid/a.jsonl|7", None, False)


def test_neighbours_of_one_expert_have_one_number():
    (document,) = routed_documents(result_of([("a", 0, 0.9), (" b", 0, 0.5), ("c", 3, 0.5)]), TERMS)
    assert [piece["changes"] for piece in document["pieces"]] == [True, False, True]
    assert [(piece["lead"], piece["text"]) for piece in document["pieces"]] == [("", "a"), (" ", "b"), ("", "c")]


def test_legend_ranks_experts_by_their_text_and_gives_the_first_ten_colours_of_their_own():
    result = result_of([("x" * (20 - cluster), cluster, 0.5) for cluster in range(12)])
    legend = routing_legend(result, TERMS)
    assert [one["cluster"] for one in legend] == list(range(12))
    assert [one["colour"] for one in legend] == [*range(10), 0, 1]
    assert legend[0]["share"] == 20 / sum(range(9, 21))
    assert legend[0]["terms"] == "def, self, return, class"


def test_three_documents_of_1500_characters_are_shown():
    documents = routed_documents(result_of(*[[("x" * 1000, 0, 0.5), ("y" * 1000, 3, 0.5), ("z", 0, 1.0)]] * 4), TERMS)
    assert len(documents) == 3
    assert [len(piece["text"]) for piece in documents[0]["pieces"]] == [1000, 500]
    assert documents[0]["cut"]
    assert routed_documents({}, TERMS) == []
    assert routing_legend({"routing": None}, TERMS) == []


def test_kept_text_keeps_lines_and_tabs_and_nothing_that_breaks_or_reorders_them():
    assert kept_text("a\r\n\tb \x00\ud800\u202ec\r", 20) == "a\n\tb \ufffd\ufffdc\n"
    assert kept_text("abcdef", 3) == "abc"
