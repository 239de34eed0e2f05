from hf_recipe.core.exhibit import Table
from hf_recipe.core.finding import Finding
from hf_recipe.core.report import Report
from hf_recipe.report.model_card import END, START, render_markdown, write_model_card
from tests.report.samples import rich_report


def test_the_section_holds_verdict_findings_gates_answers_and_checks():
    card = rich_report().to_markdown()
    assert "1 error, 2 warnings, 2 notes; 18 checks ran, 3 skipped, 1 crashed." in card
    assert (
        "| error | `loss-not-finite` | the raw loss is nan at 2 of 8 steps; the Trainer logged "
        "4.297 | train, step 4 | gradient-not-finite |" in card
    )
    assert "| complexify | not done | the loss is not finite; never overfitted |" in card
    assert "| tune | not reached |  |" in card
    assert "| Is more data worth it? | yes: twice the rows, -0.09 nats |" in card
    assert "| `gradient-not-finite` | ran (run) | warning |" in card
    assert "| `overfitting` | skipped: no eval\\_dataset | - |" in card
    assert "| `ranks-diverge` | crashed: ValueError | - |" in card


def test_every_row_of_a_table_has_as_many_cells_as_its_head():
    odd = "a | b\n| c | <script>x</script> `d` [e](f) *g*"
    report = Report(flat=[Finding(check="a", stage="data", severity="error", message=odd)])
    lines = [line for line in render_markdown(report).splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {6}
    assert "<script" not in render_markdown(report)
    assert "\\[e\\](f) \\*g\\*" in render_markdown(report)


def test_the_last_stages_tables_are_folded_away():
    private = Table("Rows", "tune", ("row",), (("a secret",),), private=True)
    early = Table("Columns", "data", ("column",), (("pixels",),))
    late = Table(
        "Fidelity", "tune", ("what", "value"), (("a|b", 0.12345), ("c", None)), "of 9 rows"
    )
    card = render_markdown(Report(exhibits=[early, late, private]))
    assert "**Fidelity**\n\n| what | value |\n| --- | --- |\n| a\\|b | 0.1235 |\n| c |  |" in card
    assert "of 9 rows" in card
    assert "secret" not in card
    assert "pixels" not in card


def test_no_row_of_the_data_is_in_it():
    card = render_markdown(rich_report())
    assert "alert(" not in card
    assert "391" not in card
    assert "secret" not in card


def test_the_card_keeps_what_others_wrote_and_is_written_again_in_place(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\n# My model\n")
    write_model_card(path, Report(ran={"a": ["run"]}))
    first = path.read_text()
    assert first.startswith("---\nlicense: mit\n---\n# My model\n\n" + START)
    path.write_text(first + "\nmore by hand\n")
    write_model_card(path, rich_report())
    second = path.read_text()
    assert second.count(START) == second.count(END) == 1
    assert "loss-not-finite" in second
    assert second.startswith("---\nlicense: mit\n---\n# My model\n")
    assert second.endswith(END + "\n\nmore by hand\n")


def test_a_card_that_does_not_exist_is_written(tmp_path):
    write_model_card(tmp_path / "README.md", Report())
    assert (tmp_path / "README.md").read_text().startswith(START)
