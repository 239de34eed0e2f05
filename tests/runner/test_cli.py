"""The command line, as its user types it."""

import json
import subprocess
import sys

import pytest

from hf_recipe.cli import main
from hf_recipe.core.finding import Finding
from hf_recipe.core.report import Report
from hf_recipe.explanation import stored_checks


def test_explain_says_what_why_and_how(capsys):
    assert main(["explain", "split-leak"]) == 0
    said = capsys.readouterr().out
    entry = stored_checks()["split-leak"]
    assert "split-leak   " in said
    assert "fix" in said
    assert "source" in said
    assert entry["why"].split()[0] in said
    assert max(map(len, said.splitlines())) <= 100


def test_explain_lists_and_suggests(capsys):
    assert main(["explain"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(stored_checks())
    assert main(["explain", "split-leek"]) == 2
    assert "did you mean 'split-leak'?" in capsys.readouterr().err


def test_explain_imports_no_torch():
    code = (
        "import sys; from hf_recipe.cli import main; main(['explain', 'split-leak']); "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_env(capsys):
    assert main(["env"]) == 0
    assert "transformers" in capsys.readouterr().out


def test_report_is_rendered_and_refused(tmp_path, capsys):
    report = Report(title="A run", status="finished")
    report.add(Finding("split-leak", "data", "error", "3 rows", fix="remove them"))
    report.to_json(tmp_path / "report.json")
    for name in ("page.html", "found.sarif", "card.md"):
        assert main(["report", str(tmp_path / "report.json"), "--to", str(tmp_path / name)]) == 0
        assert "split-leak" in (tmp_path / name).read_text()
    assert main(["report", str(tmp_path / "report.json"), "--to", str(tmp_path / "x.pdf")]) == 2
    assert main(["report", str(tmp_path / "none.json")]) == 2
    (tmp_path / "other.json").write_text("[]")
    assert main(["report", str(tmp_path / "other.json")]) == 2
    assert "is not a report" in capsys.readouterr().err
    (tmp_path / "cut.json").write_text('{"a": 1,')
    assert main(["report", str(tmp_path / "cut.json")]) == 2
    assert "cut.json is not a report: no JSON, line 1 column 9" in capsys.readouterr().err
    (tmp_path / "old.json").write_text('{"a": 1}')
    assert main(["report", str(tmp_path / "old.json")]) == 2
    assert capsys.readouterr().err.count("not a report") == 1


def test_autopsy_reads_what_a_run_left(tmp_path, capsys):
    folder = tmp_path / "run" / "checkpoint-4"
    folder.mkdir(parents=True)
    history = [{"step": 2, "loss": 2.0}, {"step": 4, "loss": 1.0}]
    state = {"global_step": 4, "max_steps": 10, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert main(["autopsy", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "step 4 of 10" in said
    assert "lowest 1.0000 (step 4)" in said
    assert main(["autopsy", str(tmp_path / "none")]) == 2


SCRIPT = """
import sys, torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

class Rows(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, i):
        ids = torch.tensor([1 + i % 19, 1 + (3 * i) % 19, 5])
        return {"input_ids": ids, "labels": torch.tensor(i % 2)}

if __name__ == "__main__":
    model = BertForSequenceClassification(BertConfig(vocab_size=20, hidden_size=16,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if sys.argv[1:] == ["stale"]:
        model.classifier = torch.nn.Linear(16, 2)
    args = TrainingArguments(OUT, max_steps=50, use_cpu=True, report_to="none")
    trainer = Trainer(model, args, train_dataset=Rows(), optimizers=(optimizer, None))
    try:
        trainer.train()
    except Exception:
        pass
    open(OUT + "/trained", "w").write("yes")
"""


@pytest.mark.parametrize(("argument", "code"), [("stale", 1), ("fine", 0)])
def test_check_stops_an_unchanged_script_before_its_first_step(tmp_path, argument, code, capsys):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("OUT", repr(str(tmp_path))))
    assert main(["check", str(script), argument]) == code
    assert not (tmp_path / "trained").exists()
    assert ("parameter-unoptimized" in capsys.readouterr().err) == (argument == "stale")


def test_check_names_a_script_that_never_trains(tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_text("x = 1\n")
    assert main(["check", str(script)]) == 2
    assert "without calling Trainer.train()" in capsys.readouterr().err
    script.write_text("raise KeyError('path')\n")
    assert main(["check", str(script)]) == 2
    assert "KeyError" in capsys.readouterr().err


def test_the_demo_finds_exactly_what_was_planted(tmp_path, capsys):
    assert main(["demo", "--output_dir", str(tmp_path)]) == 0
    assert "exactly these" in capsys.readouterr().out
