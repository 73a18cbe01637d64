"""Training as jobs: one at a time, paused by the Ctrl-C that saves, and nothing lost by a restart."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file

import customize
from customize.app.cli import main
from customize.app.jobs import FOLDER, Job, Jobs
from customize.errors import UserError
from customize.runs.listing import is_written, progress_of, run_state, runs_in
from tiny import tiny

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def settings(images, tmp_path):
    tiny("sd15").save_pretrained(tmp_path / "base")
    return {
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "instance_data_dir": str(images),
        "instance_prompt": "a photo of sks dog",
        "resolution": 16,
        "rank": 2,
        "max_train_steps": 3,
        "checkpointing_steps": 1000,
    }


def until(jobs: Jobs, job: Job, states: tuple, seconds: float = 90.0) -> Job:
    end = time.time() + seconds
    while job.state not in states and time.time() < end:
        time.sleep(0.1)
    assert job.state in states, (job.state, job.message, jobs.log_of(job)[-2000:])
    return job


def test_jobs_run_one_after_the_other_and_a_queued_one_can_be_cancelled(settings, tmp_path):
    jobs = Jobs(tmp_path / "work", most_queued=3)
    try:
        first, second, third = (
            jobs.submit("me", "dreambooth", tmp_path / "work" / name, settings) for name in "abc"
        )
        until(jobs, first, ("running", "done"))
        assert second.state == "queued"
        assert [jobs.position(own) for own in (first, second, third)] == [0, 1, 2]
        jobs.pause(third)
        assert third.state == "cancelled"
        until(jobs, second, ("done",))
        assert first.state == "done"
        assert not third.run.exists()
        lines = [progress_of(own.run) for own in (first, second)]
        assert lines[0][-1]["time"] <= lines[1][0]["time"]
        assert [line["state"] for line in lines[0]][-1] == "done"
        assert lines[0][-1]["step"] == lines[0][-1]["steps"] == 3
        assert [own.id for own in jobs.of("me")] == [third.id, second.id, first.id]
        assert jobs.of("another") == []
        with pytest.raises(UserError, match="no such run"):
            jobs.get("another", first.id)
    finally:
        jobs.close()


def test_a_paused_job_goes_on_and_ends_as_one_that_was_not(settings, tmp_path):
    settings |= {"max_train_steps": 300}
    jobs = Jobs(tmp_path / "work")
    try:
        job = jobs.submit("me", "dreambooth", tmp_path / "work" / "fox", settings)
        while not progress_of(job.run) and job.state in ("queued", "running"):
            time.sleep(0.02)
        assert is_written(job.run)
        jobs.pause(job)
        until(jobs, job, ("paused",))
        assert "stopped at step" in job.message
        state = run_state(job.run)
        assert state.state == "stopped"
        assert 0 < state.step < 300
        assert progress_of(job.run)[-1]["state"] == "stopped"
        jobs.resume(job)
        until(jobs, job, ("done",))
    finally:
        jobs.close()
    straight = customize.train("dreambooth", **settings, output_dir=tmp_path / "straight")
    found, expected = load_file(job.run / FILE), load_file(straight / FILE)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    steps = [line["step"] for line in progress_of(job.run)]
    assert steps == sorted(steps)


def test_a_failure_is_told_in_the_words_of_the_terminal(settings, tmp_path):
    jobs = Jobs(tmp_path / "work")
    try:
        wrong = settings | {"instance_data_dir": str(tmp_path / "nowhere")}
        job = jobs.submit("me", "dreambooth", tmp_path / "work" / "fox", wrong)
        until(jobs, job, ("failed",))
        assert "nowhere" in job.message
        job.settings = settings
        jobs.resume(job)  # mended
        until(jobs, job, ("done",))
        with pytest.raises(UserError, match="not paused"):
            jobs.resume(job)
    finally:
        jobs.close()


def test_closing_saves_the_running_job_and_a_new_start_keeps_the_queue(settings, tmp_path):
    settings |= {"max_train_steps": 100_000}
    jobs = Jobs(tmp_path / "work", most_queued=1)
    job = jobs.submit("me", "dreambooth", tmp_path / "work" / "fox", settings)
    while not progress_of(job.run) and job.state in ("queued", "running"):
        time.sleep(0.02)
    waiting = jobs.submit("me", "dreambooth", tmp_path / "work" / "bus", settings | {"max_train_steps": 1})
    with pytest.raises(UserError, match="waiting already"):
        jobs.submit("me", "dreambooth", tmp_path / "work" / "third", settings)
    jobs.close()
    assert job.state == "paused"
    assert run_state(job.run).state == "stopped"
    assert waiting.state == "queued"
    (tmp_path / "work" / FOLDER / "damaged.json").write_text("{")
    again = Jobs(tmp_path / "work")
    try:
        assert {own.id: own.run.name for own in again.of("me")} == {job.id: "fox", waiting.id: "bus"}
        until(again, again.get("me", waiting.id), ("done",))
    finally:
        again.close()


def test_a_job_whose_process_outlived_the_page_is_watched(tmp_path):
    folder = tmp_path / "work" / FOLDER
    folder.mkdir(parents=True)
    run = tmp_path / "work" / "fox"
    run.mkdir()
    (run / "progress.jsonl").write_text('{"step": 3, "steps": 3, "state": "done"}\n')
    described = {"id": "x", "visitor": "me", "method": "dreambooth", "folder": str(run), "settings": {}}
    (folder / "x.json").write_text(json.dumps(described | {"state": "running"}))
    jobs = Jobs(tmp_path / "work")
    try:
        until(jobs, jobs.get("me", "x"), ("done",), 5)
    finally:
        jobs.close()


def test_runs_of_a_folder_are_listed_with_what_they_do(settings, tmp_path, capsys):
    work = tmp_path / "runs"
    done = {"validation_prompt": ["a photo of sks dog"], "validation_steps": 2}
    customize.train("dreambooth", **settings, **done, output_dir=work / "group" / "done")
    (work / "failed").mkdir()
    (work / "failed" / "progress.jsonl").write_text(
        '{"step": 1, "steps": 9, "state": "training", "method": "m"}\n{"st'
    )
    (work / "no run").mkdir()
    found = {run.name: run for run in runs_in(work)}
    assert found.keys() == {"group/done", "failed"}
    assert found["group/done"].state == "done"
    assert found["group/done"].thumbnail.name == "step-000003.png"
    assert found["failed"].state == "failed"
    assert found["failed"].step == 1
    images = [line["images"] for line in progress_of(work / "group" / "done") if "images" in line]
    assert images == ["samples/step-000002.png", "samples/step-000003.png"]
    assert main(["runs", str(work)]) == 0
    shown = capsys.readouterr().out
    assert "group/done  done" in shown
    assert "step 1 of 9" in shown
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err
