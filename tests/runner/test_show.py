"""What the main job prints: no line wider than the console's, no figure without a meaning."""

from hf_recipe.baselines.human import HumanBaseline
from hf_recipe.core.report import Gate
from hf_recipe.report.console import WIDTH
from hf_recipe.runner.asking import told
from hf_recipe.runner.show import Show


def test_long_lines_are_wrapped_under_their_beginning(capsys):
    show = Show()
    show.say("       " + "loss 0.6932 " * 20)
    show.gate(Gate("baselines", "warn", ("warn: " + "a reason " * 30,)))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[1].startswith(" " * 7)
    assert lines[1][7] != " "
    assert sum(line.count("reason") for line in lines) == 30


def test_paths_are_not_broken_and_empty_lines_stay(capsys):
    path = "experiments: /a-folder/" + "long-name/" * 20
    Show().say("\nfirst\n" + path)
    assert capsys.readouterr().out.replace("\n/", " /") == f"\nfirst\n{path}\n"


def test_what_one_annotator_cannot_tell_is_not_told():
    alone = HumanBaseline(
        annotators=1, rows=4, right=3, answered=4, low=0.3, high=0.954, disagreements=(7,)
    )
    assert told(alone).splitlines() == [
        "rows          4, by 1 annotator",
        "accuracy      75.0% [30.0%, 95.4%]",
        "disagreements 1, rows 7",
    ]


def test_agreement_and_time_are_told_where_they_are_known():
    two = HumanBaseline(
        annotators=2,
        rows=4,
        right=8,
        answered=8,
        low=0.676,
        high=1.0,
        self_agreement=1.0,
        self_kappa=1.0,
        kappa_low=1.0,
        kappa_high=1.0,
        alpha=1.0,
        seconds=2.04,
    )
    assert told(two).splitlines()[2:] == [
        "self          agreement 1.000, kappa 1.000 [1.000, 1.000]",
        "annotators    Krippendorff's alpha 1.000",
        "time          2.0 s an answer",
        "disagreements 0",
    ]
