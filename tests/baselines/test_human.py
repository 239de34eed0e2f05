"""The human baseline: figures by hand, scripted annotators, a browser, kill -9, strangers."""

import http.client
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import cohen_kappa_score

import hf_recipe
from hf_recipe.baselines.human import (
    HUMAN_GAP,
    Answers,
    HumanBaseline,
    bootstrap_kappa,
    cohen_kappa,
    draw_rows,
    human_baseline,
    human_interview,
    krippendorff_alpha,
    read_answers,
    sign_test,
    wilson,
)
from hf_recipe.data.source import Roles
from hf_recipe.instruments.interview import ask_in_terminal
from hf_recipe.instruments.local_page import LocalPage
from tests.models import classifier

ROOT = Path(__file__).resolve().parents[2]
CHROME = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    return datasets.Dataset.from_dict({"pixels": pixels.tolist(), "label": labels.tolist()})


ROLES = Roles("label", ("pixels",))


# ---------------------------------------------------------------- figures


def test_figures_by_hand():
    assert wilson(90, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    draw = np.random.default_rng(0)
    a = draw.integers(0, 3, 200)
    b = np.where(draw.random(200) < 0.7, a, draw.integers(0, 3, 200))
    assert cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))
    low, high = bootstrap_kappa(a, b)
    assert low < cohen_kappa(a, b) < high
    assert high - low < 0.25
    assert np.isnan(cohen_kappa([1, 1], [1, 1]))
    assert np.isnan(cohen_kappa([], []))
    assert np.isnan(bootstrap_kappa([1, 1], [1, 1])).all()
    assert sign_test(0, 0) == 1.0
    assert sign_test(0, 10) == pytest.approx(2 / 2**10)


def test_krippendorff_alpha_of_a_published_table():
    """Krippendorff 2011, four observers, missing data: nominal alpha 0.743."""
    table = [
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    ]
    answers = [{i: int(v) for i, v in enumerate(r.split()) if v != "."} for r in table]
    assert krippendorff_alpha(answers) == pytest.approx(0.743, abs=5e-4)
    assert np.isnan(krippendorff_alpha([{0: 1, 1: 1}, {0: 1, 1: 1}]))


def test_rows_are_drawn_by_class_and_repeated_far_apart():
    labels = [0] * 900 + [1] * 90 + [2] * 10
    order = draw_rows(labels, 100, 0.25, seed=3)
    assert order == draw_rows(labels, 100, 0.25, seed=3)
    assert len(order) == 125
    assert len(set(order)) == 100
    drawn = np.array(labels)[order[:100]]
    assert np.bincount(drawn).tolist()[1:] == [9, 1]
    gaps = [len(order) - 1 - order[::-1].index(r) - order.index(r) for r in order[100:]]
    assert min(gaps) >= 20
    assert len(draw_rows([0, 1], 100, 0.25, seed=0)) == 2


def test_the_gap_on_literal_numbers():
    seen = HumanBaseline(
        annotators=1,
        rows=100,
        right=90,
        answered=100,
        low=0.83,
        high=0.94,
        model_right=97,
        model_rows=100,
        better=9,
        worse=2,
    )
    told = next(HUMAN_GAP.judge(seen))
    assert "no difference" not in told.message or "p = " in told.message
    assert "90.0%" in told.message
    assert "97.0%" in told.message
    even = HumanBaseline(1, 10, 9, 10, 0.6, 1.0)
    assert not list(HUMAN_GAP.judge(even))
    with pytest.raises(ValueError, match="no row"):
        human_baseline([Answers((0, 1), {}, {}, ())], {})


# ---------------------------------------------------------------- scripted annotators


def annotate(digits, path, answer, **settings):
    interview = human_interview(digits, ROLES, path, count=80, seed=1, **settings)
    keys = "".join(f"{answer(digits[q.row]['label'])}\n" for q in interview.questions)
    ask_in_terminal(interview, keys=io.StringIO(keys), screen=io.StringIO())
    return human_baseline([read_answers(path)], dict(enumerate(digits["label"])))


def test_scripted_annotators_get_the_figures_that_are_known(digits, tmp_path):
    oracle = annotate(digits, tmp_path / "oracle.jsonl", lambda y: y)
    assert (oracle.right, oracle.answered, oracle.self_agreement) == (80, 80, 1.0)
    assert oracle.self_kappa == 1.0
    assert oracle.disagreements == ()
    constant = annotate(digits, tmp_path / "constant.jsonl", lambda y: 3)
    assert constant.right == constant.answered - len(constant.disagreements)
    assert constant.low < 0.1 < constant.high
    assert np.isnan(constant.self_kappa)  # one answer alone: no kappa
    draw = np.random.default_rng(0)
    noisy = annotate(
        digits, tmp_path / "noisy.jsonl", lambda y: (y + 5 * (draw.random() < 0.3)) % 10
    )
    assert noisy.low < 0.7 < noisy.high
    assert noisy.self_kappa < 0.9
    both = [read_answers(tmp_path / f"{name}.jsonl") for name in ("oracle", "noisy")]
    agreed = human_baseline(both, dict(enumerate(digits["label"])))
    assert agreed.annotators == 2
    assert 0.4 < agreed.alpha < 0.95


def test_the_asking_is_blind_and_undo_and_skip_work(digits, tmp_path):
    interview = human_interview(digits, ROLES, tmp_path / "me.jsonl", count=10)
    truth = [digits[q.row]["label"] for q in interview.questions]
    screen = io.StringIO()
    ask_in_terminal(interview, keys=io.StringIO("s\n4\nu\n77\n5\nq\n"), screen=screen)
    assert interview.answers == {0: None, 1: 5}
    assert "77" in screen.getvalue()
    assert all(not q.hint and "label" not in q.text for q in interview.questions)
    again = human_interview(digits, ROLES, tmp_path / "me.jsonl", count=10)
    assert again.place == 2
    assert [digits[q.row]["label"] for q in again.questions] == truth


def test_killing_it_loses_nothing(tmp_path):
    rows = [{"text": f"this is number {i}", "label": i % 3} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = [sys.executable, "-m", "hf_recipe.cli", "human", "rows.jsonl", "--count", "20"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdin.write(b"1\n2\n0\n")
    process.stdin.flush()
    journal = tmp_path / "recipe_human" / "me.jsonl"
    end = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, input="s\nq\n", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "[4/25]" in done.stdout
    assert "accuracy" in done.stdout
    assert len(read_answers(journal).first) == 3


# ---------------------------------------------------------------- the page


def ask_page(page, path, method="GET", body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
    connection.request(method, path, body=body, headers=headers)
    reply = connection.getresponse()
    return reply.status, reply.read()


def test_strangers_are_refused(digits, tmp_path):
    interview = human_interview(digits, ROLES, tmp_path / "me.jsonl", count=5)
    page = LocalPage(interview)
    own, answer = f"/{page.token}", json.dumps({"place": 0, "choice": 3})
    try:
        assert ask_page(page, f"{own}/")[0] == 200
        assert ask_page(page, "/")[0] == 403
        assert ask_page(page, f"/{page.token}x/state")[0] == 403
        assert ask_page(page, f"{own}/state", Host="evil.example")[0] == 403
        assert (
            ask_page(page, f"{own}/answer", "POST", answer, Origin="http://evil.example")[0] == 403
        )
        assert ask_page(page, "/wrong/answer", "POST", answer)[0] == 403
        assert interview.answers == {}
        assert ask_page(page, f"{own}/answer", "POST", "x")[0] == 400
        assert ask_page(page, f"{own}/answer", "POST", "[]")[0] == 400
        assert ask_page(page, f"{own}/answer", "POST", '{"place": "0", "choice": 1}')[0] == 400
        assert ask_page(page, f"{own}/other")[0] == 404
        assert page._server.server_address[0] == "127.0.0.1"
        status, state = ask_page(page, f"{own}/answer", "POST", answer)
        assert (status, json.loads(state)["place"]) == (200, 1)
        assert ask_page(page, f"{own}/answer", "POST", answer)[0] == 200  # sent twice: once noted
        assert interview.answers == {0: 3}
    finally:
        page.close()


@pytest.mark.skipif(CHROME is None, reason="no chromium here to drive")
def test_an_oracle_in_a_real_browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.common.exceptions import WebDriverException

    data = datasets.Dataset.from_dict(
        {
            "text": [f"<script>document.title='bad'</script> row {i}" for i in range(12)],
            "label": [i % 3 for i in range(12)],
        }
    )
    path = tmp_path / "web.jsonl"
    interview = human_interview(data, Roles("label", ("text",)), path, count=8)
    page = LocalPage(interview)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROME
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    driver_path = shutil.which("chromedriver")
    try:
        service = webdriver.ChromeService(driver_path) if driver_path else None
        driver = webdriver.Chrome(options=options, service=service)
    except WebDriverException as error:
        page.close()
        pytest.skip(f"chromium does not start here: {str(error).splitlines()[0]}")
    try:
        driver.get(page.address)
        body = driver.find_element("tag name", "body")
        body.send_keys("0")
        wait(lambda: 0 in interview.answers)
        body.send_keys("u")
        wait(lambda: not interview.answers)
        for place, question in enumerate(interview.questions):
            wait(lambda p=place: f"{p + 1} of" in driver.find_element("id", "place").text)
            assert driver.find_element("id", "text").text == question.text
            body.send_keys(str(data[question.row]["label"]))
            wait(lambda p=place: p in interview.answers)
        assert page.done.wait(60)
        assert driver.title == "hf-recipe"
    finally:
        driver.quit()
        page.close()
    seen = human_baseline([read_answers(path)], dict(enumerate(data["label"])))
    assert seen.right == seen.answered == 8
    assert seen.self_agreement == 1.0


def wait(until):
    end = time.monotonic() + 120
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)


# ---------------------------------------------------------------- against the model


def test_the_report_says_how_far_the_model_is(tmp_path):
    trainer = classifier(tmp_path, max_steps=2)
    recipe = hf_recipe.attach(trainer, select=["human-gap"])
    trainer.train()
    path = tmp_path / "me.jsonl"
    data = trainer.eval_dataset
    interview = human_interview(data, Roles("labels", ("input_ids",)), path, count=40)
    while (place := interview.place) is not None:
        interview.answer(place, data[interview.questions[place].row]["labels"])
    assert "human-gap" in recipe.report.skipped
    mode = trainer.model.training
    seen = hf_recipe.compare_with_human(recipe, path)
    assert trainer.model.training is mode
    assert seen.model_rows == seen.answered == 40
    assert seen.right == 40
    assert seen.model_right < 40
    found = [f for f in recipe.findings if f.check == "human-gap"]
    assert found[0].severity == "note"
    assert "100.0%" in found[0].message
    assert "person is better" in found[0].message
    with pytest.raises(ValueError, match="no split 'test'"):
        hf_recipe.compare_with_human(recipe, path, split="test")
