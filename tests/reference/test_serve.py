"""The page: what its tabs give, and that a person with a browser can use them."""

from __future__ import annotations

import io
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dalle_reference import cli, views
from dalle_reference.clip import CLIP
from dalle_reference.clip import PRESETS as CLIPS
from dalle_reference.dvae import PRESETS as DVAES
from dalle_reference.dvae import DiscreteVAE
from dalle_reference.errors import UserError
from dalle_reference.generate import generate
from dalle_reference.tokenizer import CaptionTokenizer
from dalle_reference.transformer import DalleTransformer, TransformerConfig
from PIL import Image

from dalle_kernels import Neighborhood, Row, Strided, TokenLayout
from tests.reference.test_train import TINY_CLIP, TINY_DVAE, TINY_TRANSFORMER, refused, start

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'dalle_kernels[serve]'")
from dalle_reference import serve


@pytest.fixture(scope="module")
def painter() -> views.Painter:
    torch.manual_seed(0)
    dvae = DiscreteVAE(DVAES["tiny"])
    shape = {"grid": dvae.config.grid, "vocab_image": dvae.config.vocab, "heads": 1, "head_dim": 16, "layers": 2}
    model = DalleTransformer(TransformerConfig(vocab_text=300, text_length=8, **shape))
    return views.Painter(model.eval(), CaptionTokenizer.train(["a red square"] * 9, 300), dvae.eval())


@pytest.fixture(scope="module")
def judge() -> views.Judge:
    torch.manual_seed(0)
    return views.Judge(CLIP(CLIPS["tiny"]).eval(), CaptionTokenizer.train(["a red square"] * 9, 299))


def test_pictures_come_row_by_row_and_the_best_first(painter: views.Painter, judge: views.Judge) -> None:
    rows = painter.model.config.grid[0]
    pages = list(views.draw(painter, None, "a <red> square", 3, 1.0, 1.5, 7))
    assert len(pages) == rows + 1
    for number, page in enumerate(pages[:-1], 1):
        assert page.count("<img ") == 3
        assert f"row {number} of {rows}" in page
    assert "a &lt;red&gt; square" in pages[-1]
    text = painter.tokenizer.encode(["a <red> square"], painter.model.config.caption_length)
    drawn = generate(painter.model, text, seed=7, number=3, guidance_scale=1.5)
    wanted = painter.dvae.decode(drawn.unflatten(1, painter.model.config.grid))
    assert pages[-1] == views._figures(wanted, ["a <red> square"] * 3)
    *_, ranked = views.draw(painter, judge, "a <red> square", 3, 1.0, 1.5, 7)
    values = [float(value) for value in re.findall(r"<figcaption>agreement (-?[\d.]+)", ranked)]
    assert len(values) == 3
    assert values == sorted(values, reverse=True)
    told: list[str] = []
    list(views.draw(painter, None, "red " * 50, 1, 1.0, 1.0, 0, warn=told.append))
    assert told == ["The caption is long: the model reads its first 7 tokens."]
    sources = re.compile(r'src="([^"]+)"')
    assert sorted(sources.findall(ranked)) == sorted(sources.findall(pages[-1]))


def test_nothing_is_drawn_for_who_has_gone(painter: views.Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, ended, columns = threading.Event(), threading.Event(), painter.model.config.grid[1]
    steps: list[int] = []

    def waiting(*args: Any, progress: Callable[[int, torch.Tensor], None], **settings: Any) -> torch.Tensor:
        def step(done: int, tokens: torch.Tensor) -> None:
            steps.append(done)
            progress(done, tokens)
            assert done != columns or gone.wait(60)

        try:
            return generate(*args, progress=step, **settings)
        finally:
            ended.set()

    monkeypatch.setattr(views, "generate", waiting)
    pages = views.draw(painter, None, "red", 1, 1.0, 1.0, 0)
    assert "row 1 of" in next(pages)
    pages.close()  # type: ignore[attr-defined]
    gone.set()
    assert ended.wait(60)
    assert max(steps) == columns + 1


def test_of_two_panels_the_upper_one_is_what_is_kept(painter: views.Painter) -> None:
    rows, columns = painter.dvae.config.grid
    config = replace(painter.model.config, grid=(2 * rows, columns))
    page = serve.make_page(replace(painter, model=DalleTransformer(config)), None)
    labels = [block for block in page.blocks.values() if str(getattr(block, "label", "")).startswith("Rows of")]
    assert [(block.label, block.maximum, block.value) for block in labels] == [
        (f"Rows of {rows} that are kept", rows, rows)
    ]


def test_a_picture_s_top_is_kept(painter: views.Painter, pictures: Path) -> None:
    red = str(pictures / "red.png")
    *_, page = views.draw(painter, None, "blue", 2, 1.0, 1.0, 0, red, 5)
    *_, whole = views.draw(painter, None, "blue", 2, 1.0, 1.0, 0, red, painter.model.config.grid[0])
    assert page != whole
    pixels = torch.from_numpy(np.array(Image.open(red).convert("RGB"))).permute(2, 0, 1)[None] / 255.0
    kept = painter.dvae.decode(painter.dvae.encode(pixels))
    assert whole == views._figures(kept.expand(2, -1, -1, -1), ["blue"] * 2)


def test_what_cannot_be_drawn_is_said(painter: views.Painter, judge: views.Judge, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="picture: got none"):
        list(views.draw(painter, None, "red", 1, 1.0, 1.0, 0, None, 3))
    with pytest.raises(ValueError, match="temperature"):
        list(views.draw(painter, None, "red", 1, -1.0, 1.0, 0))
    rubbish, large, heavy = tmp_path / "rubbish.png", tmp_path / "large.png", tmp_path / "heavy.png"
    rubbish.write_bytes(b"\x89PNG no picture")
    Image.new("1", (5000, 5000)).save(large)
    heavy.write_bytes(bytes(9 << 20))
    for file, message in (
        (rubbish, r"^rubbish.png: cannot be read as a picture"),
        (large, "large.png: has 25,000,000 pixels, wanted at most 16,777,216"),
        (heavy, "^heavy.png: has 9437184 bytes, wanted at most 8388608"),
        (tmp_path / "gone.png", "^gone.png: No such file"),
    ):
        with pytest.raises(UserError, match=message):
            views.classify(judge, str(file), "cat")
    good = tmp_path / "good.png"
    Image.new("RGB", (20, 10), "red").save(good)
    for names in ("", " \n", "\n".join(map(str, range(51)))):
        with pytest.raises(UserError, match="names: got"):
            views.classify(judge, str(good), names)
    seen, shares = views.classify(judge, str(good), "cat\ndog\n\n cat \n" + 2000 * "x")
    assert seen.count("<img ") == 1
    assert list(shares) == ["cat", "dog", 500 * "x"]
    assert sum(shares.values()) == pytest.approx(1.0)


def test_patterns_are_shown_as_they_are_defined() -> None:
    layout = TokenLayout(6, (4, 4))
    places = views.token_places(Row(layout))
    assert places.tolist() == [
        [0, 1, 2, 3],
        [4, 5, -1, -1],
        [-1] * 4,
        *(np.arange(6, 22).reshape(4, 4).tolist()),
    ]
    assert views.token_places(Strided(10, 3)).shape == (3, 4)
    layers = views.token_places(Neighborhood((2, 3, 5), window=1))
    assert layers.shape == (7, 5)
    assert (layers[3] == -1).all()

    keys, tiles, words = views.look(f"Row({layout})", (30, 24 * 4 + 1))  # the second column of row 4, which is token 11
    scale = keys.shape[0] // 7
    shades = keys[scale // 2 :: scale, scale // 2 :: scale]
    wanted = Row(layout).mask()[11].tolist()
    for token in range(layout.length):
        (y,), (x,) = np.nonzero(places == token)
        kind = 3 if token == 11 else 2 if wanted[token] else 1
        assert (shades[y, x] == views._SHADES[kind]).all()
    assert f"query             11, which sees {sum(wanted)} keys" in words
    assert f"visible pairs     {Row(layout).visible_pairs}" in words
    assert tiles.shape == (48, 48, 3)
    assert views.look(f"Row({layout})", (30, 24 * 2 + 1))[2] == views.look(f"Row({layout})")[2], "between text and grid"


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "does not parse"),
        ("Row(", "does not parse"),
        ("__import__('os')", "wanted constructors of"),
        ("Row(TokenLayout(0, (99999, 2)))", "got the number 99,999"),
        ("Neighborhood((4000, 4000), 3)", "got 16,000,000 tokens, wanted at most 4,096"),
        ("Packed(dalle_pattern_schedule(999999999, TokenLayout(1, (1, 1))))", "got the number 999,999,999"),
        ("(" * 499, "does not parse"),
        ("x" * 501, "got 501 letters"),
        ("Neighborhood((4, 4), 0)", "window"),
    ],
)
def test_patterns_that_cannot_be_shown_are_refused(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        views.look(expression)


@pytest.mark.parametrize("expression", serve._PATTERNS)
def test_the_patterns_that_are_offered_can_be_shown(expression: str) -> None:
    keys, tiles, words = views.look(expression)
    assert keys.dtype == tiles.dtype == np.uint8
    assert "executed pairs" in words


def test_without_gradio_one_line_says_what_brings_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "dalle_reference.serve")
    monkeypatch.delattr("dalle_reference.serve")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "gradio is not installed; pip install 'dalle_kernels[serve]' brings it" in refused(["serve"], capsys)
    assert "port: got 0" in refused(["serve", "--port", "0"], capsys)


def test_an_address_that_is_taken_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(["serve", "--port", str(port)], capsys)
    assert f"127.0.0.1:{port}: cannot be listened at" in said
    assert "Address already in use" in said
    assert "cannot be listened at" in refused(["serve", "--host", "256.0.0.1.", "--port", str(port)], capsys)


@pytest.fixture(scope="module")
def address(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `dalle-reference serve` serves models of a few steps."""
    folder = tmp_path_factory.mktemp("served")
    runs = {name: str(folder / name) for name in ("dvae", "transformer", "clip")}
    cli.main(["train-dvae", "demo", *TINY_DVAE, *common, "--steps", "2", "--out", runs["dvae"]])
    of_dvae = ["--dvae", runs["dvae"], "--out", runs["transformer"]]
    cli.main(["train-transformer", "demo", *TINY_TRANSFORMER, *common, "--steps", "2", *of_dvae])
    cli.main(["train-clip", "demo", *TINY_CLIP, *common, "--held-out", "0", "--steps", "2", "--out", runs["clip"]])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start(["serve", "--model", runs["transformer"], "--clip", runs["clip"], "--port", str(port)])
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith(f"http://127.0.0.1:{port}") for line in lines), "ended before it served"
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGINT)
    assert "stopped" in process.communicate(timeout=60)[0]
    assert process.returncode == 130


def test_a_person_with_a_browser(address: str, pictures: Path, tmp_path: Path) -> None:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "window-size=1300,1000", f"user-data-dir={tmp_path / 'profile'}"),
    ):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))

    def find(selector: str):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def wait(what: str, happened):
        deadline = time.monotonic() + 120
        while not happened():
            if time.monotonic() > deadline:
                browser.save_screenshot(str(tmp_path / "failed.png"))
                pytest.fail(f"waited in vain for {what}; {tmp_path / 'failed.png'}")
            time.sleep(0.1)

    def tab(name: str) -> None:
        (button,) = (each for each in browser.find_elements(By.CSS_SELECTOR, "button[role=tab]") if each.text == name)
        button.click()

    def captions(selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0] + ' figcaption')].map(e => e.textContent)"
        return browser.execute_script(script, selector)

    def looked(name: str) -> np.ndarray:
        shot = tmp_path / f"{name}.png"
        assert browser.save_screenshot(str(shot))
        return np.array(Image.open(io.BytesIO(shot.read_bytes())).convert("RGB"))

    try:
        browser.get(address)
        wait("the page", lambda: browser.find_elements(By.CSS_SELECTOR, "#draw-caption textarea"))
        # Two at once: each waits for the other, and both get their pictures.
        first = browser.current_window_handle
        browser.switch_to.new_window("tab")
        browser.get(address)
        wait("the second page", lambda: browser.find_elements(By.CSS_SELECTOR, "#draw-caption textarea"))
        second = browser.current_window_handle
        for window, words in ((first, "a red square"), (second, "blue")):
            browser.switch_to.window(window)
            find("#draw-caption textarea").send_keys(words)
            find("#draw-button").click()
        for window in (second, first):
            browser.switch_to.window(window)
            wait("pictures", lambda: [text.startswith("agreement") for text in captions("#draw-shown")] == [True] * 8)
        assert np.ptp(looked("drawn")) > 200

        tab("Complete")
        find("#complete-caption textarea").send_keys("red")
        find("#complete-picture input[type=file]").send_keys(str(pictures / "red.png"))
        wait("the upload", lambda: "red" in find("#complete-picture").text)
        find("#complete-button").click()
        wait("completions", lambda: [text[:9] for text in captions("#complete-shown")] == ["agreement"] * 8)
        looked("completed")

        tab("Classify")
        find("#classify-names textarea").send_keys("red\nblue\ncat")
        find("#classify-picture input[type=file]").send_keys(str(pictures / "blue.png"))
        wait("the upload", lambda: "blue" in find("#classify-picture").text)
        find("#classify-button").click()
        wait("guesses", lambda: "%" in find("#classify-guesses").text)
        looked("classified")
        rubbish = tmp_path / "rubbish.png"
        rubbish.write_bytes(b"no picture")
        find("#classify-picture button[aria-label='Clear']").click()
        wait("an empty field", lambda: browser.find_elements(By.CSS_SELECTOR, "#classify-picture input[type=file]"))
        find("#classify-picture input[type=file]").send_keys(str(rubbish))
        wait("the upload", lambda: "rubbish" in find("#classify-picture").text)
        find("#classify-button").click()
        wait("an error", lambda: "rubbish.png: cannot be read as a picture" in find("body").text)
        looked("refused")

        tab("Patterns")
        wait("counts", lambda: "visible pairs" in find("#pattern-counts").text)
        before = find("#pattern-counts").text
        find("#pattern-keys img").click()  # its middle
        wait("another query", lambda: find("#pattern-counts").text not in (before, ""))
        drawn = find("#pattern-keys img").get_attribute("src")
        field = find("#pattern input")
        field.send_keys(Keys.CONTROL + "a")
        field.send_keys("Strided(64, 8)" + Keys.ENTER)
        wait("another pattern", lambda: re.search(r"tokens +64\b", find("#pattern-counts").text))
        wait("its picture", lambda: find("#pattern-keys img").get_attribute("src") != drawn)
        looked("patterns")

        script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
        assert {name for name in browser.execute_script(script) if not name.startswith((address, "data:"))} == set()
        severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert severe == []
    finally:
        browser.quit()
