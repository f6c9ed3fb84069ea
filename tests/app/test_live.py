"""The live model: one owner, jobs that end, wait, fail and are cancelled, and numbers that are the model's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import headscope as hs
from headscope.app.factory import create_app
from headscope.app.live.capture import capture_prompt
from headscope.app.live.change import Change, chosen_heads
from headscope.app.live.compare import compare_writing
from headscope.app.live.owner import KEPT, WAITING, Job, ModelOwner
from headscope.errors import DataError, InterventionError, ModelError, UnavailableError
from headscope.store import open_run

PROMPT = (
    "the old tree sleeps . the code of alice is amber falcon river . the old tree sleeps . question : what is the code of alice ? answer :"
)


@pytest.fixture(scope="module")
def owner() -> Iterator[ModelOwner]:
    opened = ModelOwner(load=lambda: hs.load("bundled:needle"), name="bundled:needle")
    yield opened
    opened.close()


def end(job: Job) -> Job:
    until = time.monotonic() + 120
    while not job.ended:
        assert time.monotonic() < until
        time.sleep(0.01)
    return job


def test_both_texts_and_their_numbers_are_the_models_own(owner: ModelOwner) -> None:
    change = Change("scale", "2.0, 2.1, 3.0", strength=-1.0)
    found = end(owner.submit("compare", compare_writing(PROMPT, change.stack(), 6))).result
    scope = owner.scope
    assert scope is not None
    ids = scope.encode(PROMPT)
    plain = scope.generate(ids, max_new_tokens=6)
    edit = hs.interventions.Scale(heads="2.0, 2.1, 3.0", gamma=-1.0)
    with scope.intervene(edit):
        changed = scope.generate(ids, max_new_tokens=6)
    assert "".join(found.plain).split() == plain.text.split()
    assert "".join(found.changed).split() == changed.text.split()
    with torch.no_grad():
        p = scope.model(plain.ids).logits[0, ids.shape[1] - 1 : -1].double().log_softmax(-1)
        with scope.intervene(edit):
            q = scope.model(plain.ids).logits[0, ids.shape[1] - 1 : -1].double().log_softmax(-1)
    written = plain.new_ids[0]
    assert found.log_p == pytest.approx((float(p[range(6), written].mean()), float(q[range(6), written].mean())), abs=1e-9)
    assert found.kl == pytest.approx(float((p[0].exp() * (p[0] - q[0])).sum()), abs=1e-9)
    assert found.candidates[0].plain == pytest.approx(float(p[0].exp().max()))
    first = next((at for at in range(6) if plain.new_ids[0, at] != changed.new_ids[0, at]), None)
    assert found.first == first


def test_a_prompt_becomes_a_run_that_holds_its_attention(owner: ModelOwner, tmp_path: Path) -> None:
    job = end(owner.submit("capture", capture_prompt(PROMPT, tmp_path)))
    assert job.state == "done", job.error
    run = open_run(tmp_path / job.result)
    scope = owner.scope
    assert scope is not None
    ids = scope.encode(PROMPT)
    assert run.tokens is not None
    assert list(run.tokens.ids) == ids[0].tolist()
    stats = scope.capture(ids, statistics=["entropy"])
    assert torch.allclose(torch.from_numpy(run.statistic("row/entropy", 3, 2)).double(), stats["entropy"][3][0, 2].double(), atol=1e-5)
    assert run.window(3, 2, 0, 8, 0, 8).shape == (8, 8)


def test_a_path_in_a_prompt_is_text(owner: ModelOwner, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("amber falcon river " * 60)
    job = end(owner.submit("capture", capture_prompt(str(secret), tmp_path / "runs")))
    if job.state == "done":
        kept = open_run(tmp_path / "runs" / job.result).tokens
        assert kept is not None
        assert "amber" not in "".join(kept.strings)
    else:
        assert "prompt of" in job.error


def test_a_running_job_stops_at_the_next_call_and_leaves_the_model_as_it_was(owner: ModelOwner) -> None:
    scope = owner.scope
    assert scope is not None
    ids = scope.encode(PROMPT)
    before = scope.model(ids).logits.detach().clone()
    job = owner.submit("long", compare_writing(PROMPT, Change("scale", "0.3", strength=0.5).stack(), 256))
    while job.state == "waiting" or (job.share or 0) == 0:
        time.sleep(0.005)
    assert owner.cancel(job.id)
    assert end(job).state == "cancelled"
    assert not owner.cancel(job.id)
    assert torch.equal(scope.model(ids).logits, before)
    assert not any(module._forward_pre_hooks for name, module in scope.model.named_modules() if name.endswith("self_attn"))


def test_one_at_a_time_in_order_and_a_waiting_one_can_be_cancelled() -> None:
    gate, ran, inside = threading.Event(), [], []

    def work(name: str):
        def run(scope: object, job: Job) -> str:
            inside.append(name)
            assert len(inside) == 1
            assert gate.wait(20)
            ran.append(name)
            inside.remove(name)
            return name

        return run

    model: Any = object()
    owner = ModelOwner(model)
    jobs = [owner.submit(name, work(name)) for name in "abcd"]
    while jobs[0].state != "running":
        time.sleep(0.005)
    assert [owner.place(job) for job in jobs] == [0, 1, 2, 3]
    assert owner.cancel(jobs[2].id)
    assert jobs[2].state == "cancelled"
    for name in range(WAITING - 2):
        owner.submit(f"more {name}", work(f"more {name}"))
    with pytest.raises(UnavailableError, match=f"behind {WAITING} others"):
        owner.submit("too many", work("too many"))
    gate.set()
    assert end(jobs[3]).result == "d"
    assert ran[:3] == ["a", "b", "d"]
    owner.close()


def test_failures_are_told_and_the_owner_goes_on(owner: ModelOwner) -> None:
    job = end(owner.submit("bad head", compare_writing(PROMPT, Change("mask", "99.1").stack(), 4)))
    assert job.state == "failed"
    assert "layers are 0..5" in job.error

    def defect(scope: object, job: Job) -> None:
        raise ZeroDivisionError("planted")

    assert end(owner.submit("defect", defect)).error == "ZeroDivisionError: planted"
    assert end(owner.submit("after", lambda scope, job: 7)).result == 7


def test_a_model_that_cannot_be_loaded_fails_its_jobs_and_says_why() -> None:
    def load() -> hs.Scope:
        raise ModelError("no such model")

    owner = ModelOwner(load=load, name="nothing")
    while not owner.error:
        time.sleep(0.005)
    with pytest.raises(UnavailableError, match="no such model"):
        owner.submit("job", lambda scope, job: 1)
    owner.close()


def test_old_jobs_are_forgotten_and_names_cannot_be_guessed(owner: ModelOwner) -> None:
    first = end(owner.submit("first", lambda scope, job: 0))
    for _ in range(KEPT + 4):
        last = end(owner.submit("next", lambda scope, job: 0))
    assert owner.job(first.id) is None
    assert owner.job(last.id) is last
    assert len(last.id) >= 22
    for name in ("", None, 1, ["a"], {"id": last.id}, "../../etc"):
        assert owner.job(name) is None
        assert not owner.cancel(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Change("mask", ""), "no heads"),
        (Change("mask", "top 3 induction"), "no run is chosen"),
        (Change("mask", "0.0", mode="bogus"), "mode"),
        (Change("act", "0.0", strength=2.0), "share that a sink keeps"),
        (Change("temperature", "0.0", strength=0.0), "divided by it"),
        (Change("noise", "0.0", strength=-1.0), "not negative"),
        (Change("json", spec="{"), "no JSON"),
        (Change("json", spec='[{"intervention": "bogus"}]'), "bogus"),
        (Change("dance", "0.0"), "dance"),
    ],
)
def test_a_form_that_cannot_be_meant(change: Change, message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        change.stack()


def test_heads_by_profile(synthetic) -> None:
    profile = hs.HeadProfile.load(synthetic.path)
    assert chosen_heads("top 2 sink", profile) == list(profile.rank("sink", 2))
    stack = Change("json", spec='{"intervention": "head_mask", "heads": "top 2 sink", "mode": "zero"}').stack(profile)
    assert stack.interventions[0].heads == tuple(profile.rank("sink", 2))


def test_lengths_out_of_range(owner: ModelOwner) -> None:
    stack = Change("mask", "0.0").stack()
    for count in (0, -1, 257):
        with pytest.raises(DataError, match="1 to 256"):
            compare_writing(PROMPT, stack, count)
    assert "reads 16384" in end(owner.submit("long", compare_writing("the " * 16_380, stack, 64))).error
    assert "empty text" in end(owner.submit("empty", compare_writing(" ", stack, 4))).error


def test_pages_with_and_without_a_model(synthetic, owner: ModelOwner) -> None:
    from headscope.app.pages import live

    plain = create_app(synthetic.path.parent)
    with plain.server.test_request_context("/live"):
        assert "No model is loaded" in str(live.layout())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(live, "ctx", type("Ctx", (), {"triggered_id": "live-compare"}))
            shown, job, disabled = live.submit(1, None, None, PROMPT, "mask", "0.0", "zero", None, None, None, 4)
            assert "no model is loaded" in str(shown)
            assert (job, disabled) == ("", True)
    app = create_app(synthetic.path.parent, model=owner)
    with app.server.test_request_context("/live"):
        assert "6 layers, 48 heads" in str(live.layout(prompt="hello", heads="1.2"))
        shown, disabled, _, _ = live.poll(1, "unknown")
        assert disabled
        assert "gone" in str(shown)


@pytest.mark.browser
def test_masking_a_head_in_the_browser(synthetic, owner: ModelOwner) -> None:
    import shutil

    from playwright.sync_api import sync_playwright
    from waitress import create_server

    server = create_server(create_app(synthetic.path.parent, model=owner).server, host="127.0.0.1", port=0, threads=4)
    threading.Thread(target=server.run, daemon=True).start()
    wrong: list[str] = []
    path = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--disable-gpu"])
        page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.effective_port}/live")
        page.fill("#live-prompt", PROMPT, timeout=20_000)
        page.fill("#live-heads", "2.0, 2.1")
        page.click("#live-compare")
        page.wait_for_selector(".live-texts", timeout=60_000)
        assert "alice is" in page.inner_text(".live-texts")
        assert "heads=2.0%2C+2.1" in page.url
        page.reload()
        page.wait_for_selector("#live-compare", timeout=20_000)
        assert page.input_value("#live-prompt") == PROMPT
        page.fill("#live-heads", "77.0")
        page.click("#live-compare")
        page.wait_for_selector(".live-failed", timeout=60_000)
        assert "layers are 0..5" in page.inner_text(".live-failed")
        page.click("#live-capture")
        page.wait_for_selector("#live-output a", timeout=60_000)
        page.click("#live-output a")
        page.wait_for_selector("#grid .heatmaplayer image", state="attached", timeout=60_000)
        assert page.inner_text("h1") == "Needle"
        browser.close()
    server.close()
    assert wrong == []
