"""The web page through its HTTP API: what it draws and teaches, who sees what, and what is refused."""

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from customize.app.generate import GenerateConfig
from customize.app.web import visitors
from customize.app.web.cutout import cut
from customize.app.web.drawing import with_word
from customize.app.web.forms import value_of
from customize.app.web.teaching import CASES, expert_flags, settings_of
from customize.app.web.visitors import Visitor, Visitors
from customize.config import flags_of
from customize.errors import UserError
from customize.runs.listing import progress_of
from customize.stickers import Drawing
from customize.stickers.bench import write_references
from page import served

QUICK = {"number": 1, "steps": 2, "new_seed": False, "seed": 5}


@pytest.fixture(scope="module")
def owner(tmp_path_factory):
    """A page of one's own computer: its address, its parts and its folder."""
    work = tmp_path_factory.mktemp("work")
    with served(work) as (address, page):
        yield address, page, work


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """A page for visitors from elsewhere."""
    work = tmp_path_factory.mktemp("public")
    with served(work, shared=True) as (address, page):
        yield address, page, work


def client(address: str, visitor: str = "") -> Client:
    headers = {visitors.HEADER: visitor} if visitor else {}
    return Client(address, verbose=False, headers=headers)


def fox(folder: Path, count: int = 2, word: str = "fox") -> list:
    folder.mkdir(exist_ok=True)
    write_references(folder, Drawing(word, "flat"), word)
    return [{"image": handle_file(path), "caption": None} for path in sorted(folder.glob("*.png"))[:count]]


def image_of(entry) -> Image.Image:
    with Image.open(entry["image"]) as image:
        image.load()
        return image


# drawing


def test_the_same_request_draws_the_same_image_as_the_command_line(owner, tmp_path):
    address, _, work = owner
    gallery, note, seed = client(address).predict("a fox on the beach", **QUICK, api_name="/draw")
    assert seed == 5
    assert "Done, seed 5" in note
    image = image_of(gallery[0])
    from customize.app.cli import main

    words = ["generate", "stickers", "a fox on the beach", "--seed", "5", "--num_inference_steps", "2"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.png")
    with Image.open(path) as expected:
        assert np.abs(np.asarray(expected, int) - np.asarray(image, int)).max() <= 1
        assert json.loads(image.info["parameters"]) == json.loads(expected.info["parameters"])
    assert [own.name for own in (work / "generated").glob("*.png")] == ["a-fox-on-the-beach-5.png"]


def test_images_of_a_subject_are_used_without_a_switch(owner, tmp_path):
    address, _, _ = owner
    own = client(address)
    plain = own.predict("a fox on the beach", **QUICK, api_name="/draw")[0]
    images = fox(tmp_path / "fox")
    with_images = own.predict("a fox on the beach", images=images, word="fox", **QUICK, api_name="/draw")[0]
    assert np.abs(np.asarray(image_of(plain[0]), int) - np.asarray(image_of(with_images[0]), int)).max() > 10
    saved = json.loads(image_of(with_images[0]).info["parameters"])
    assert saved["prompt"] == "a <s> fox on the beach"
    two = {"images": images, "word": "fox", "images_2": images, "word_2": "snail"}
    gallery = own.predict(
        "a fox and a snail on grass", **two, placement="first left, second right", **QUICK, api_name="/draw"
    )[0]
    saved = json.loads(image_of(gallery[0]).info["parameters"])
    assert saved["prompt"] == "a <s> fox and a <s2> snail on grass"
    assert saved["side_by_side"] is True


def test_painted_places_hold_the_subjects(owner, tmp_path):
    """Red is the first subject's place, blue the second's; other places give another image."""
    address, page, _ = owner
    seen, draw = [], page.drawer.draw

    def watched(run, prompt, seeds, config, masks=None):
        seen.append(masks)
        return draw(run, prompt, seeds, config, masks)

    page.drawer.draw = watched
    found = []
    for left, right in (((255, 60, 40, 255), (30, 120, 180, 255)), ((30, 120, 180, 255), (255, 60, 40, 255))):
        layer = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
        layer.paste(left, (0, 0, 40, 96))
        layer.paste(right, (56, 0, 96, 96))
        layer.save(tmp_path / "layer.png")
        painting = {"background": None, "layers": [handle_file(tmp_path / "layer.png")], "composite": None}
        two = {"images": fox(tmp_path / "fox"), "word": "fox", "painting": painting}
        two |= {"images_2": fox(tmp_path / "snail", word="snail"), "word_2": "snail"}
        gallery = client(address).predict(
            "a fox and a snail on grass", **two, placement="painted below", **QUICK, api_name="/draw"
        )[0]
        found.append(np.asarray(image_of(gallery[0]), int))
    page.drawer.draw = draw
    for masks, first_left in zip(seen, (True, False), strict=True):
        first, second = (np.asarray(masks[name]) for name in ("<s>", "<s2>"))
        assert (first[:, :40] == 255).all() == first_left
        assert (first[:, 56:] == 255).all() != first_left
        assert not (first & second).any()
    assert np.abs(found[0] - found[1]).max() > 10


MISTAKES = {
    "too many": ({"number": 200}, "maximum value 8"),
    "too many steps": ({"steps": 5000}, "maximum value 100"),
    "too large": ({"size": 100_000}, "maximum value 1536"),
    "no prompt": ({"prompt": "  "}, "PROMPT"),
    "a path as model": ({"model": "../../etc"}, "no finished run"),
    "an absolute path as model": ({"model": "/etc"}, "no finished run"),
    "an unknown run": ({"model": "nobody"}, "no finished run"),
    "a run to mix in": ({"loras": ["/etc/passwd"]}, "no finished run"),
    "weights": ({"weights": "1, 2"}, "Give 0 weights"),
    "seed": ({"seed": -4}, "Seed"),
    "guidance": ({"guidance": "much"}, "Guidance scale"),
    "word": ({"images": "FOX", "word": "cat"}, "does not have the word 'cat'"),
    "no word": ({"images": "FOX"}, "name its word"),
    "one subject side by side": (
        {"images": "FOX", "word": "fox", "placement": "first left, second right"},
        "two subjects",
    ),
    "nothing painted": ({"images": "FOX", "word": "fox", "placement": "painted below"}, "Paint where"),
    "five images": ({"images": "FIVE", "word": "fox"}, "4 at most"),
    "no image": ({"images": "TEXT", "word": "fox"}, "no image|Invalid|not an image|cannot identify"),
    "a bomb": ({"images": "BOMB", "word": "fox"}, "million pixels|exceeds limit"),
}


def bomb(path: Path) -> Path:
    """A PNG of a few hundred bytes that states 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_a_sentence(name, owner, tmp_path):
    changes, said = MISTAKES[name]
    (tmp_path / "text.png").write_text("no image")
    images = {
        "FOX": lambda: fox(tmp_path / "fox"),
        "FIVE": lambda: fox(tmp_path / "fox", 4) + fox(tmp_path / "fox", 1),
        "TEXT": lambda: [{"image": handle_file(tmp_path / "text.png"), "caption": None}],
        "BOMB": lambda: [{"image": handle_file(bomb(tmp_path / "bomb.png")), "caption": None}],
    }
    if changes.get("images") in images:
        changes = changes | {"images": images[changes["images"]]()}
    request = {"prompt": "a fox on the beach"} | QUICK | changes
    with pytest.raises(AppError, match=said):
        client(owner[0]).predict(**request, api_name="/draw")


# teaching


def wait_for(address: str, name: str, states: tuple, seconds: float = 120, visitor: str = "") -> dict:
    own = client(address, visitor)
    end = time.time() + seconds
    while time.time() < end:
        found = {run["name"]: run for run in own.predict(api_name="/jobs")}
        if found.get(name, {}).get("state") in states:
            return found[name]
        time.sleep(0.5)
    pytest.fail(f"{name} is not {states}: {found.get(name)}")


def test_a_subject_is_taught_paused_taken_up_and_drawn(owner, tmp_path):
    address, _, work = owner
    own = client(address)
    settings = json.dumps({"max_train_steps": 40, "rank": 2, "train_batch_size": 1})
    teach = {"words": "fox", "case": CASES[0].name, "name": "my fox", "settings": settings}
    run, said = own.predict(images=fox(tmp_path / "fox", 4), **teach, api_name="/teach")
    assert "my-fox" in str(run) + said
    [listed] = own.predict(api_name="/jobs")  # at once, before anything is written
    assert listed["name"] == "my-fox"
    assert listed["state"] in ("queued", "training")
    end = time.time() + 90
    while not progress_of(work / "my-fox") and time.time() < end:
        time.sleep(0.1)
    own.predict("my-fox", api_name="/pause")
    paused = wait_for(address, "my-fox", ("stopped",))
    assert 0 < paused["step"] < 40
    assert (work / "my-fox" / f"checkpoint-{paused['step']}").is_dir()
    own.predict("my-fox", api_name="/resume")
    done = wait_for(address, "my-fox", ("done",))
    assert done["step"] == 40
    assert progress_of(work / "my-fox")[-1]["state"] == "done"
    gallery = own.predict("a sks fox in the snow", model="my-fox", **QUICK, api_name="/draw")[0]
    assert json.loads(image_of(gallery[0]).info["parameters"])["run"] == "my-fox"
    shutil.copy(work / "my-fox" / "pytorch_lora_weights.safetensors", work / "theirs.safetensors")
    mixed = {"loras": ["theirs.safetensors"], "weights": "0.5"}
    gallery = own.predict("a sks fox in the snow", **mixed, **QUICK, api_name="/draw")[0]
    assert json.loads(image_of(gallery[0]).info["parameters"])["lora"] == ["theirs.safetensors:0.5"]
    step = f"my-fox/checkpoint-{paused['step']}"
    own.predict("a sks fox in the snow", model=step, **QUICK, api_name="/draw")
    config = json.loads((work / "my-fox" / "run.json").read_text())["config"]
    assert config["instance_prompt"] == "a sks fox"
    assert config["rank"] == 2


TEACHING = {
    "no images": ({"images": []}, "Bring images first"),
    "no word": ({"words": ""}, "Name in one word"),
    "one thing for several": ({"case": CASES[2].name}, "with commas between"),
    "a case": ({"case": "everything"}, "not in the list of choices"),
    "a name": ({"name": "../up"}, "The name may have"),
    "the visitors' folder": ({"name": "visitors"}, "The name may have"),
    "settings": ({"settings": "[1]"}, "no JSON object"),
    "a path": ({"settings": '{"output_dir": "/tmp/x"}'}, "no setting of dreambooth"),
    "another path": ({"settings": '{"class_data_dir": "/etc"}'}, "no setting of dreambooth"),
    "a list file": ({"settings": '{"concepts_list": "/etc/passwd"}'}, "no setting of dreambooth"),
    "a tracker": ({"settings": '{"report_to": "tensorboard"}'}, "no setting of dreambooth"),
    "the hub": ({"settings": '{"push_to_hub": true}'}, "no setting of dreambooth"),
    "a number": ({"settings": '{"rank": "many"}'}, "Rank"),
    "a range": ({"settings": '{"learning_rate": -1}'}, "Learning rate"),
    "a base model": ({"base": "/etc"}, "no finished run"),
}


@pytest.mark.parametrize("name", TEACHING)
def test_mistakes_in_teaching_start_nothing(name, owner, tmp_path):
    changes, said = TEACHING[name]
    address, page, work = owner
    before = sorted(path.name for path in work.iterdir()), len(page.jobs.jobs)
    given = {"images": fox(tmp_path / "fox"), "words": "fox", "case": CASES[0].name, "name": "x"}
    with pytest.raises(AppError, match=said):
        client(address).predict(**(given | changes), api_name="/teach")
    assert (sorted(path.name for path in work.iterdir()), len(page.jobs.jobs)) == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_settings_of_every_case_are_those_of_its_method(case):
    words = "fox, bus" if "several" in case.name else "fox"
    made = settings_of(case, "stickers", words, Path("images"), {"max_train_steps": 7})
    assert made["max_train_steps"] == 7
    assert made["instance_data_dir"] == "images"
    assert made["validation_steps"] == 1
    paths = {"output_dir", "cache_dir", "concepts_list", "class_data_dir", "report_to", "push_to_hub"}
    offered = {flag.name for flag in expert_flags(case.method)}
    assert not offered & (paths | {"hub_model_id", "pretrained_words", "auxiliary_list", "push_to_hub"})
    assert {"max_train_steps", "learning_rate", "snr_gamma"} <= offered


# comparing


def test_a_comparison_is_one_image(owner):
    request = {
        "runs": ["stickers"],
        "prompts": "a fox\na bus",
        "scales": "",
        "steps": "1, 2",
        "seeds": 1,
        "seed": 0,
    }
    image, note = client(owner[0]).predict(**request, api_name="/compare")
    assert "4 images" in note
    with Image.open(image) as grid:
        assert grid.width > 2 * 128
        assert grid.height > 2 * 128
    for changes, said in (
        ({"steps": "x"}, "no numbers"),
        ({"runs": []}, "Choose models"),
        ({"prompts": ""}, "Choose models|write prompts"),
        ({"seeds": 1000}, "maximum value 4"),
        ({"runs": ["/etc"]}, "no finished run"),
    ):
        with pytest.raises(AppError, match=said):
            client(owner[0]).predict(**(request | changes), api_name="/compare")


# who sees what


def test_a_second_visitor_neither_sees_nor_loses_the_first_ones_runs(public, tmp_path):
    address, _, work = public
    first, second = "a" * 32, "b" * 32
    settings = json.dumps({"max_train_steps": 2, "rank": 2})
    given = {"words": "fox", "case": CASES[0].name, "name": "secret", "settings": settings}
    client(address, first).predict(images=fox(tmp_path / "fox"), **given, api_name="/teach")
    wait_for(address, "secret", ("done",), visitor=first)
    others = client(address, second)
    assert others.predict(api_name="/jobs") == []
    for call in ("/pause", "/resume"):
        with pytest.raises(AppError, match=r"not at work|cannot go on"):
            others.predict("secret", api_name=call)
    [place] = [path for path in (work / "visitors").iterdir() if (path / "secret").exists()]
    for name in ("secret", f"../{place.name}/secret", f"visitors/{place.name}/secret", str(place / "secret")):
        with pytest.raises(AppError, match="no finished run"):
            others.predict("a fox", model=name, **QUICK, api_name="/draw")
    others.predict(images=fox(tmp_path / "fox"), **given, api_name="/teach")  # the same name, another folder
    wait_for(address, "secret", ("done",), visitor=second)
    assert len(list((work / "visitors").glob("*/secret/run.json"))) == 2


def test_limits_of_visitors(public, tmp_path):
    own = client(public[0], "c" * 32)
    for changes, said in (
        ({"number": 5}, "4 at most"),
        ({"steps": 51}, "50 at most"),
        ({"model": "a/b"}, "no finished"),
    ):
        with pytest.raises(AppError, match=said):
            own.predict(**({"prompt": "a fox"} | QUICK | changes), api_name="/draw")
    settings = json.dumps({"max_train_steps": 100_000})
    with pytest.raises(AppError, match="no setting"):  # of visitors: it takes more memory
        own.predict(
            images=fox(tmp_path / "fox"), words="fox", settings='{"train_batch_size": 9}', api_name="/teach"
        )
    with pytest.raises(AppError, match="2000 at most"):
        own.predict(
            images=fox(tmp_path / "fox"),
            words="fox",
            case=CASES[0].name,
            name="x",
            settings=settings,
            api_name="/teach",
        )


def test_a_browser_gets_a_token_that_scripts_cannot_read(public):
    answer = httpx.get(public[0] + "/")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"{visitors.COOKIE}=")
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    again = httpx.get(public[0] + "/", cookies={visitors.COOKIE: "d" * 32})
    assert visitors.COOKIE not in again.headers.get("set-cookie", "")


class Request:
    def __init__(self, token: str = "", username: str | None = None, cookie: str = ""):
        self.headers = {visitors.HEADER: token} if token else {}
        self.cookies = {visitors.COOKIE: cookie} if cookie else {}
        self.username, self.session_hash = username, "s"


def test_folders_of_visitors_are_never_named_by_what_they_send(tmp_path):
    all_visitors = Visitors(tmp_path, shared=True)
    senders = [
        Request("e" * 32),
        Request(cookie="f" * 32),
        Request(username="../../eve"),
        Request("../" * 10),
    ]
    found = [all_visitors.of(sender) for sender in senders]
    assert len({visitor.folder for visitor in found}) == 4
    for visitor, sender in zip(found, senders, strict=True):
        assert visitor.folder.parent == tmp_path / "visitors"
        assert visitors.TOKEN.fullmatch(visitor.folder.name)
        assert visitor.folder.name not in (*sender.headers.values(), *sender.cookies.values())
    # a user's name counts before any token: nobody enters another user's folder by a cookie
    assert all_visitors.of(Request("e" * 32, username="../../eve")).folder == found[2].folder


def test_folders_that_are_not_used_are_deleted_and_no_others(tmp_path):
    all_visitors = Visitors(tmp_path, shared=True, hours=1, busy=lambda name: name.startswith("b"))
    old = time.time() - 7200
    for name in ("a" * 32, "b" * 32, "c" * 32, "kept"):
        (tmp_path / "visitors" / name).mkdir(parents=True)
        (tmp_path / "visitors" / name / ".seen").touch()
        if not name.startswith("c"):
            os.utime(tmp_path / "visitors" / name / ".seen", (old, old))
    all_visitors.sweep()
    assert sorted(path.name[0] for path in (tmp_path / "visitors").iterdir()) == ["b", "c", "k"]


# files: each line is a published advisory against Gradio, or a relative of one

PATHS = (
    "file=/etc/passwd",
    "file=WORK/secret.txt",
    "file=WORK/visitors/x/secret.txt",
    "file=../../../../etc/passwd",
    "file=..%2f..%2f..%2fetc/passwd",
    "file=%2e%2e/%2e%2e/etc/passwd",
    "file=file:///etc/passwd",
    "file=http://127.0.0.1:9/x",
    "file=//etc/passwd",
    "file=LINK",
    "file/etc/passwd",
    "proxy=http://127.0.0.1:9/x",
    "custom_component/../../../etc/passwd",
    "custom_component/x/component/..%2f..%2f..%2f..%2fetc%2fpasswd",
    "static/../../../../../../../etc/passwd",
    "assets/..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    "upload_progress?upload_id=../../etc/passwd",
    "deep_link?session_hash=../../etc",
)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prefix", ["/gradio_api/", "/"])
def test_no_path_leads_out(path, prefix, public):
    address, _, work = public
    (work / "secret.txt").write_text("root: secret")
    (work / "visitors" / "x").mkdir(parents=True, exist_ok=True)
    (work / "visitors" / "x" / "secret.txt").write_text("root: secret")
    link = work / "link.png"
    if not link.is_symlink():
        link.symlink_to("/etc/passwd")
    place = path.replace("WORK", str(work)).replace("LINK", str(link))
    try:
        answer = httpx.get(f"{address}{prefix}{place}", timeout=5)
    except httpx.ReadTimeout:  # a stream without an event
        return
    assert "root:" not in answer.text
    assert answer.status_code >= 400 or prefix == "/" or "session_hash" in path  # a link without content


def join(address: str, data: list, number: int, session: str = "s1") -> str:
    """What the page answers to a request of the queue that no browser would send."""
    body = {"data": data, "fn_index": number, "session_hash": session, "event_data": None, "trigger_id": None}
    answer = httpx.post(f"{address}/gradio_api/queue/join", json=body)
    if answer.status_code != 200:
        return answer.text
    found = ""
    with httpx.stream(
        "GET", f"{address}/gradio_api/queue/data", params={"session_hash": session}, timeout=60
    ) as stream:
        for line in stream.iter_lines():
            found += line
            if "process_completed" in line or "close_stream" in line:
                break
    return found


@pytest.mark.parametrize(
    "file",
    ["/etc/passwd", "/etc/hostname", "http://127.0.0.1:9/x.png", "file:///etc/passwd", "../../etc/passwd"],
)
def test_a_file_that_was_not_uploaded_is_not_read(file, public):
    address, _, _ = public
    config = httpx.get(f"{address}/config").json()
    check = next(
        d for d in config["dependencies"] if d["api_name"] == "check" or "check" in str(d.get("api_name"))
    )
    entry = {"image": {"path": file, "meta": {"_type": "gradio.FileData"}}, "caption": None}
    found = join(address, [[entry]], check["id"], session=f"s{abs(hash(file))}")
    assert '"success":true' not in found.replace(" ", "")
    assert "root:" not in found


def test_uploads_cannot_name_their_place(public):
    address = public[0]
    for name in ("../../../evil.png", "/tmp/evil-upload.png", "..\\..\\evil.png"):
        files = {"files": (name, io.BytesIO(b"x"), "image/png")}
        answer = httpx.post(f"{address}/gradio_api/upload", files=files)
        if answer.status_code == 200:
            [place] = answer.json()
            assert (
                Path(place).resolve().is_relative_to(Path(os.environ.get("GRADIO_TEMP_DIR", "/tmp/gradio")))
            )
    assert not Path("/tmp/evil-upload.png").exists()
    large = {"files": ("x.png", io.BytesIO(b"\0" * (visitors.MOST_BYTES + 2**20)), "image/png")}
    assert httpx.post(f"{address}/gradio_api/upload", files=large, timeout=60).status_code == 413


def test_a_script_that_was_uploaded_is_never_shown_as_a_page(public):
    files = {"files": ("x.html", io.BytesIO(b"<script>alert(1)</script>"), "text/html")}
    answer = httpx.post(f"{public[0]}/gradio_api/upload", files=files)
    [place] = answer.json()
    shown = httpx.get(f"{public[0]}/gradio_api/file={place}")
    assert shown.status_code in (403, 404) or "attachment" in shown.headers.get("content-disposition", "")


def test_another_site_cannot_use_the_page(owner):
    for origin in ("https://evil.example", "null"):
        answer = httpx.get(f"{owner[0]}/config", headers={"origin": origin, "host": "localhost:7860"})
        assert answer.headers.get("access-control-allow-origin") not in (origin, "*")


def test_a_password_is_asked_for(tmp_path):
    with served(tmp_path, shared=True, auth=[("ann", "secret")]) as (address, _):
        assert httpx.get(f"{address}/config").status_code == 401
        wrong = httpx.post(f"{address}/login", data={"username": "ann", "password": "wrong"})
        assert wrong.status_code == 400
        own = Client(address, auth=("ann", "secret"), verbose=False)
        assert own.predict(api_name="/jobs") == []


# the command


def test_the_command_says_what_is_missing(tmp_path, capsys, monkeypatch):
    from customize.app.cli import main

    assert main(["app", "--auth", "ann", "--work_folder", str(tmp_path)]) == 2
    assert "NAME:PASSWORD" in capsys.readouterr().err
    assert main(["app", "--port", "0", "--work_folder", str(tmp_path)]) == 2
    assert "port" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["app", "--work_folder", str(tmp_path / "file" / "runs")]) == 2
    assert "--work_folder" in capsys.readouterr().err
    monkeypatch.setattr("customize.app.app.find_spec", lambda name: None)
    assert main(["app"]) == 2
    assert "pip install 'customize[app]'" in capsys.readouterr().err


def test_the_page_ends_with_the_signal_and_saves_what_is_at_work(tmp_path):
    """As a user starts it: in a process of its own."""
    words = [
        sys.executable,
        "-m",
        "customize.app.cli",
        "app",
        "--work_folder",
        str(tmp_path),
        "--port",
        "7951",
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert "the page is at http" in next(line for line in process.stdout if "the page" in line)
        own = Client("http://127.0.0.1:7951", verbose=False)
        images = fox(tmp_path / "fox")
        settings = json.dumps({"max_train_steps": 100_000, "rank": 2, "train_batch_size": 1})
        own.predict(images=images, words="fox", name="long", settings=settings, api_name="/teach")
        end = time.time() + 90
        while not progress_of(tmp_path / "long") and time.time() < end:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=90)[0]
    assert process.returncode == 0, said
    assert "a run at work is saved first" in said
    assert "Traceback" not in said
    assert progress_of(tmp_path / "long")[-1]["state"] == "stopped"


# pieces


def test_a_visitors_run_is_looked_up_and_never_a_link(tmp_path):
    visitor = Visitor("v", tmp_path / "mine", False)
    run, elsewhere = visitor.folder / "fox", tmp_path / "theirs"
    for folder in (run, run / "checkpoint-3", elsewhere):
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"format": 1, "base_model": "stickers", "method": "x"}))
    (visitor.folder / "link").symlink_to(elsewhere)
    assert visitor.run("fox") == run
    assert visitor.run("fox/checkpoint-3") == run / "checkpoint-3"
    for name in ("link", "../theirs", str(elsewhere), "fox/../../theirs", "fox/checkpoint-4", "", "."):
        with pytest.raises(UserError, match="no finished run"):
            visitor.run(name)
    assert visitor.new_run("fox").name == "fox-2"


def test_the_form_follows_the_command_lines_rules():
    flags = {flag.name: flag for flag in flags_of(GenerateConfig)}
    assert value_of(flags["guidance_scale"], "") is None
    assert value_of(flags["guidance_scale"], "4.5") == 4.5
    assert value_of(flags["seed"], 3.0) == 3
    assert value_of(flags["attention_maps"], "fox\n\nred bus\n") == ["fox", "red bus"]
    assert value_of(flags["side_by_side"], True) is True
    for name, given in (("seed", 1.5), ("seed", None), ("guidance_scale", -1), ("dtype", "int8")):
        with pytest.raises(UserError):
            value_of(flags[name], given)


def test_the_subjects_word_gets_its_mark():
    assert with_word("a red Fox on grass", "<s>", "fox") == "a red <s> Fox on grass"
    assert with_word("a <s> fox", "<s>", "") == "a <s> fox"


def test_painting_cuts_out():
    layer = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    layer.paste((255, 0, 0, 255), (0, 0, 4, 8))
    drawn = {"background": Image.new("RGB", (16, 16), "blue"), "layers": [layer]}
    alpha = np.asarray(cut(drawn).getchannel("A"))
    assert (alpha[:, :7] == 255).all()
    assert (alpha[:, 9:] == 0).all()
    assert (np.asarray(cut(drawn | {"layers": []}).getchannel("A")) == 255).all()
