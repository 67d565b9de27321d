"""The explorer in a real JupyterLab and a real Chromium: what a person does with it, and what they then see.

Runs where the package playwright and a Chromium are found (``CHROMIUM=PATH`` names one); else it is skipped.
``PATIENCE=SECONDS`` is how long a step may take.
"""

import base64
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from atoplib.explorer import compute, controls, make_explorer
from atoplib.explorer import page as rendered

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
PATIENCE = 1000 * int(os.environ.get("PATIENCE", 120))  # milliseconds
STARTED = """() => [...document.querySelectorAll('.jp-InputPrompt')]
    .some(prompt => /[0-9*]/.test(prompt.innerText))"""
CURRENT = """() => [...document.querySelectorAll(".atop-live")].every(e => e.dataset.busy === "false")
    && !document.querySelector(".atop-stale")"""
EXPLORE = "import torch\ntorch.set_num_threads(1)\nfrom atoplib import explore\nexplore(steps=3, votes=4)"
HIGHEST, WIDTH = 680, 1280  # pixels: of the explorer, and of the window


CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
if CHROMIUM is None:
    pytest.skip("no Chromium was found: the explorer is not tested in a browser", allow_module_level=True)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is missing: the explorer is not tested in a browser"
)


@contextmanager
def jupyterlab(folder: Path, cells: Sequence[str]) -> Iterator[str]:
    """JupyterLab as `make lab` starts it, in a folder with one notebook of these cells; its address."""
    (folder / "work").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "work" / "explore.ipynb")
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    names += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **{name: str(folder / name) for name in names}, "PYTHONPATH": path}
    settings = folder / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = '{"fetchNews": "false", "checkForUpdates": false}'
    (settings / "notification.jupyterlab-settings").write_text(quiet)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--allow-root"]
    command += [f"--ServerApp.root_dir={folder / 'work'}", "--IdentityProvider.token=test"]
    log = folder / "log.txt"
    output = {"stdout": log.open("w"), "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, cwd=folder / "work", **output) as server:
        try:
            while "is running at" not in log.read_text():
                assert server.poll() is None, log.read_text()[-2000:]
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?token=test&reset"
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def errors() -> list[str]:
    """What the browser's console complained of."""
    return []


@contextmanager
def opened(address: str, explorers: int, complain: Callable[[str], None]) -> Iterator:
    """The notebook after "Run All Cells", in a window of 1280 x 800 px."""
    with playwright.sync_playwright() as program:
        browser = program.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(viewport={"width": WIDTH, "height": 800}).new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: complain(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complain(str(error)))
        page.goto(address)
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_selector("#jp-main-statusbar >> text=/[|] Idle$/")
        for patience in (10_000, 30_000, PATIENCE):  # a wish to a kernel being connected to can be lost
            choose(page, "Run", "Run All Cells")
            with suppress(playwright.TimeoutError):
                page.wait_for_function(STARTED, timeout=patience)
                break
        wait_for_explorers(page, explorers)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, errors: list[str]) -> Iterator:
    """Two explorers in one notebook."""
    cells = EXPLORE, "explore(eps=0.2, steps=2, rows=['AToP'])"
    with (
        jupyterlab(tmp_path_factory.mktemp("lab"), cells) as address,
        opened(address, 2, errors.append) as page,
    ):
        yield page


def choose(page, menu: str, *items: str) -> None:
    """Click through a menu of the menu bar."""
    page.locator(".lm-MenuBar-itemLabel").filter(has_text=re.compile(f"^{menu}$")).click()
    for item in items:
        page.locator(".lm-Menu-itemLabel").filter(has_text=re.compile(f"^{item}$")).click()


def wait_for_explorers(page, count: int = 2) -> None:
    page.wait_for_function(
        "count => document.querySelectorAll('.atop-live .atop-grid').length === count", arg=count
    )
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", state="attached")


@pytest.fixture
def page(lab):
    """The first explorer, as at its start."""
    first = lab.locator(".atop-live").first
    first.get_by_role("button", name="Reset").click()
    return first


def current(explorer, *lines: str) -> dict:
    """Wait until the pictures are current and their YAML has some lines; the values it names."""
    ends = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < ends:
        explorer.page.wait_for_function(CURRENT)
        text = explorer.get_by_label("parameters as YAML").evaluate("area => area.value")
        if all(re.search(rf"\b{re.escape(line)}\b", text.splitlines()[1]) for line in lines):
            start = {name: control.default for name, control in controls.CONTROLS.items()}
            return {**start, **controls.from_yaml(text)}
        time.sleep(0.05)
    raise AssertionError(f"no picture with {lines}; the last one is of {text.splitlines()[1]}")


def sources(explorer) -> list[str]:
    """The bytes of every picture of the rows."""
    return explorer.locator(".atop-grid img").evaluate_all("images => images.map(image => image.src)")


@pytest.fixture(scope="module")
def scene():
    """What the notebook explores."""
    torch.set_num_threads(1)
    return make_explorer().scene


def expected(values: dict, scene) -> list[str]:
    """The bytes of the pictures that the library makes of the values, in this process."""
    *_, view = compute.views(scene, values)
    shown = rendered.content(view, [])
    found = []
    for row in shown["rows"]:
        adversarial, *others = [pixels for _, pixels, _ in row["cells"]]
        found += [adversarial, shown["clean"], row["tenfold"], *others]
    return found


def drag(explorer, label: str, to: float, steps: int) -> None:
    """Drag a slider's handle to a share of its width."""
    box = explorer.get_by_label(label, exact=True).bounding_box()
    mouse, y = explorer.page.mouse, box["y"] + box["height"] / 2
    value = explorer.get_by_label(label, exact=True).evaluate("e => (e.value - e.min) / (e.max - e.min)")
    mouse.move(box["x"] + 8 + value * (box["width"] - 16), y)
    mouse.down()
    for step in range(1, steps + 1):
        share = value + (to - value) * step / steps
        mouse.move(box["x"] + 8 + share * (box["width"] - 16), y)
        time.sleep(0.03)


def test_four_defences_side_by_side_are_what_the_library_computes(page, scene) -> None:
    values = current(page, "image: 0", "steps: 3", "votes: 4")
    assert sources(page) == expected(values, scene)
    *_, view = compute.views(scene, values)
    texts = page.locator(".atop-row").all_inner_texts()
    for text, row in zip(texts, rendered.content(view, [])["rows"], strict=True):
        assert all(line in text for line in [row["name"], row["text"], *row["lines"]])


def test_the_explorer_fits_the_window_and_is_not_wider_than_its_cell(page) -> None:
    current(page, "steps: 3")
    size = page.evaluate("e => [e.getBoundingClientRect().height, e.scrollWidth, e.clientWidth]")
    assert size[0] <= HIGHEST and size[1] <= size[2]


def test_a_key_on_a_slider_changes_the_picture_and_ten_quick_ones_end_in_the_last(page, scene) -> None:
    before = current(page, "missing_rate: 0.1")
    field, old = page.get_by_label("missing", exact=True), sources(page)
    field.press("ArrowRight")
    assert current(page, "missing_rate: 0.11")["missing_rate"] == 0.11 and sources(page) != old
    for _ in range(10):
        field.press("ArrowRight")
    values = current(page, "missing_rate: 0.21")
    assert field.input_value() == "21" and values == {**before, "missing_rate": 0.21}
    assert sources(page) == expected(values, scene)


def test_dragging_shows_previews_and_ends_in_the_whole_attack(page, scene) -> None:
    current(page, "eps: 0.3")
    page.evaluate("""root => { window.seen = new Set();
        new MutationObserver(() => window.seen.add(root.querySelector('.atop-grid').innerHTML))
            .observe(root.querySelector('.atop-shown'), { childList: true }); }""")
    drag(page, "\N{SCRIPT SMALL L}\N{INFINITY} \N{GREEK SMALL LETTER EPSILON}", 0.6, 25)
    page.page.wait_for_function("() => window.seen.size >= 1")
    page.page.mouse.up()
    page.page.wait_for_function(CURRENT)
    handle = page.get_by_label("\N{SCRIPT SMALL L}\N{INFINITY} \N{GREEK SMALL LETTER EPSILON}", exact=True)
    values = current(page, f"eps: {float(handle.input_value())}")
    assert sources(page) == expected(values, scene)
    assert page.page.evaluate("() => window.seen.size") >= 2


def test_a_slow_attack_shows_its_progress_and_can_be_cancelled(page) -> None:
    others = [page.get_by_label(f"show {name}", exact=True) for name in ("undefended", "AT", "AP")]
    for field in others:  # one row: it is there as a whole, or not yet
        field.uncheck()
    current(page, 'rows: ["AToP')
    before, form = sources(page), page.locator("details", has_text="Set from YAML")
    form.locator("summary").click()
    page.get_by_label("parameters as YAML").fill("steps: 1000\neot_samples: 100")  # minutes, on any machine
    page.get_by_role("button", name="Set from YAML").click()
    form.locator("summary").click()
    page.page.wait_for_function(
        "() => /^Attack on .*[0-9] of/.test(document.querySelector('.atop-live [role=status]').innerText)"
    )
    page.get_by_role("button", name="Cancel").click()
    page.page.wait_for_function("() => document.querySelector('.atop-live').dataset.busy === 'false'")
    assert "earlier values" in page.locator("[role=status]").inner_text()
    assert sources(page) == before and page.locator(".atop-stale").count() == 1
    for field in others:
        field.check()


def test_a_drawn_and_an_uploaded_image_are_attacked_and_purified(page, tmp_path: Path) -> None:
    current(page, "image: 0")
    page.get_by_role("button", name="Draw", exact=True).click()
    box = page.get_by_label("drawing pad").bounding_box()
    page.page.mouse.move(box["x"] + 112, box["y"] + 30)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + 112, box["y"] + 190, steps=8)
    page.page.mouse.up()
    page.get_by_role("button", name="Use drawing").click()
    first = current(page, "image: 200")
    drawn = page.locator(".atop-original img").evaluate("image => image.src")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn.split(",")[1]))))
    assert pixels[16, 16].min() > 200 and pixels[16, 2].max() == 0 and first["image"] == 200
    page.get_by_label("class of your image").select_option("1")
    page.page.wait_for_function("() => /class 1$/.test(document.querySelector('.atop-original').innerText)")
    Image.fromarray(np.full((60, 60, 3), 90, np.uint8)).save(tmp_path / "grey.png")
    page.get_by_label("image file").set_input_files(tmp_path / "grey.png")
    current(page, "image: 201")
    page.get_by_label("image", exact=True).press("Home")
    current(page, "image: 0")


def test_playing_walks_along_the_path_and_stops_at_its_end(page) -> None:
    current(page, "shown_step: null")
    last = sources(page)
    page.get_by_role("button", name="Play").click()
    page.page.wait_for_function("() => /step 1 of 3/.test(document.querySelector('.atop-grid').innerText)")
    assert sources(page) != last
    page.get_by_role("button", name="\N{BLACK RIGHT-POINTING TRIANGLE} Play").wait_for()
    assert "step 3 of 3" in page.locator(".atop-grid").inner_text()


def test_two_explorers_in_one_notebook_do_not_disturb_each_other(page, lab, scene) -> None:
    second = lab.locator(".atop-live").nth(1)
    before = sources(page)
    second.get_by_label("steps", exact=True).press("ArrowRight")
    values = current(second, "steps: 3", "eps: 0.2")
    assert sources(second) == expected(values, scene) and sources(page) == before


@pytest.mark.long
def test_one_image_for_all_a_target_and_the_curve(page, scene) -> None:
    page.get_by_label("attack on").select_option("undefended")
    page.locator("summary", has_text="More").click()
    page.get_by_label("target", exact=True).select_option("7")
    values = current(page, 'attacked: "undefended', "target: 7")
    assert sources(page) == expected(values, scene)
    page.get_by_role("button", name="Accuracy over").click()
    page.page.wait_for_function("() => document.querySelectorAll('.atop-live .atop-legend').length >= 8")
    page.locator(".atop-line-eps circle").nth(1).click()
    current(page, "eps: 0.075")
    page.locator("summary", has_text="More").click()


@pytest.mark.long
def test_every_control_has_a_name_and_those_that_do_not_apply_are_disabled(page) -> None:
    current(page, "steps: 3")
    for details in page.locator("details").all():
        details.evaluate("element => { element.open = true; }")
    nameless = """e => [...e.querySelectorAll("input, select, button, textarea")]
        .filter(field => !(field.ariaLabel || field.innerText || field.labels.length))
        .map(field => field.outerHTML)"""
    assert page.locator("input, select, button").count() > 30 and page.evaluate(nameless) == []
    assert page.locator("option", has_text="DDN: deterministic models only").is_disabled()
    for name in ("undefended", "AP", "AToP"):
        page.get_by_label(f"show {name}", exact=True).uncheck()
    current(page, 'rows: ["AT')
    for name in ("threat model", "transform", "votes"):
        assert page.get_by_label(name, exact=True).is_disabled(), name
    for name in ("undefended", "AP", "AToP"):
        page.get_by_label(f"show {name}", exact=True).check()
    for details in page.locator("details").all():
        details.evaluate("element => { element.open = false; }")


@pytest.mark.long
@pytest.mark.parametrize("theme", ["Dark", "Light"])
@pytest.mark.parametrize("width", [1024, 1440])
def test_nothing_is_wider_than_its_cell_in_either_theme(page, theme: str, width: int) -> None:
    choose(page.page, "Settings", "Theme", f"JupyterLab {theme}")
    page.page.wait_for_selector(f"body[data-jp-theme-name='JupyterLab {theme}']", state="attached")
    page.page.set_viewport_size({"width": width, "height": 800})
    page.get_by_label("transform", exact=True).select_option("RT3: noise, masks")
    current(page, 'transform: "rt3')
    widths = page.evaluate("element => [element.scrollWidth, element.clientWidth]")
    assert widths[0] <= widths[1]
    ground = "getComputedStyle(document.querySelector('.jp-Notebook')).backgroundColor"
    colours = page.evaluate(f"element => [getComputedStyle(element).color, {ground}]")
    light, dark = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert abs(light - dark) > 450, f"text and ground are too much alike: {colours}"
    page.page.set_viewport_size({"width": WIDTH, "height": 800})


@pytest.mark.long
def test_a_restarted_kernel_gives_a_fresh_explorer_even_while_an_attack_runs(page, lab, scene) -> None:
    page.get_by_role("button", name="Strict").click()
    lab.wait_for_selector(".atop-stale", state="attached")
    choose(lab, "Kernel", "Restart Kernel and Run All Cells…")
    lab.locator(".jp-Dialog .jp-mod-accept").click()
    lab.wait_for_function("() => document.querySelectorAll('.atop-live .atop-grid').length < 2")
    wait_for_explorers(lab)
    fresh = lab.locator(".atop-live").first
    values = current(fresh, "steps: 3", "eps: 0.3")
    assert sources(fresh) == expected(values, scene)
    fresh.get_by_label("noise", exact=True).press("ArrowRight")
    values = current(fresh, "noise_std: 0.15")
    assert sources(fresh) == expected(values, scene)
    assert lab.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0


def test_the_still_is_hidden_where_the_explorer_is_alive_and_the_console_holds_no_errors(lab, errors) -> None:
    stills = lab.locator(".atop-still")
    assert stills.count() == 2 and not any(still.is_visible() for still in stills.all())
    assert errors == []
