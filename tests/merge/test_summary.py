"""The summary in Markdown, on results written by hand."""

from hand_made_result import make_result

from cbtm.merge.headline import verdict
from cbtm.merge.summary import render_summary


def test_summary_has_the_verdict_and_every_arm_of_the_headline():
    text = render_summary(make_result())
    lines = text.splitlines()
    assert lines[2].replace("\\", "") == verdict(make_result())
    assert "| seed model | 60.0 |" in text
    # 40/50 - 1 = -20 %
    assert next(line for line in lines if "all 4 experts" in line).endswith("| -20.0 % |")
    assert [line.count("|") for line in lines if line.startswith("|")] == [6] * 9  # 7 arms, head and rule


def test_text_of_the_run_shows_as_it_is():
    result = make_result()
    result["run"] |= {"name": "a|b <img src=x>\n# c [d](e)", "root": "s3://bucket/`x`"}
    text = render_summary(result)
    assert text.splitlines()[0] == r"# a\|b \<img src=x\> \# c \[d\]\(e\)"
    assert text.splitlines()[-1] == "Everything of this run is below `s3://bucket/x`."
