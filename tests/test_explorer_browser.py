"""The explorer in a real JupyterLab and a real Chromium: what a person does with it, and what he then sees.

Runs where the package playwright and a Chromium are found (``CHROMIUM=PATH`` names one); else it is skipped, in one line.
``SCREENSHOTS=FOLDER`` keeps the pages as pictures, to be looked at; ``PATIENCE=SECONDS`` is how long a step may take.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
import torch

from atoplib import attacks, verdicts
from atoplib.explorer import compute
from atoplib.explorer import page as rendered
from atoplib.explorer.knobs import Knobs, from_yaml
from atoplib.explorer.suite import ATTACKS

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
PATIENCE = 1000 * int(os.environ.get("PATIENCE", 120))  # milliseconds; more, for a machine that has much else to do
STARTED = "() => [...document.querySelectorAll('.jp-InputPrompt')].some(prompt => /[0-9*]/.test(prompt.innerText))"
SETUP = """
from pathlib import Path
import torch
from atoplib.classifiers import build_classifier
from atoplib.data import load_dataset
from atoplib.pipeline import AToPPipeline
from atoplib.purifiers import build_purifier
from atoplib.transforms import TransformSettings

torch.set_num_threads(1)
torch.manual_seed(0)
digits = load_dataset("mnist5k", data_dir=Path("data"), max_train=16, max_test=40)
classifier = build_classifier(
    "small_resnet", num_classes=10, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), width=4, stem_stride=2
).eval()
purifier = build_purifier("gated_unet", width=8, blocks=1, fold=4)
defences = {"AToP": AToPPipeline(TransformSettings("rt2", 0.25, 0.1), purifier, classifier).eval(), "undefended": classifier}
"""
EXPLORE = "from atoplib.explorer import explore\n\nexplore(defences, digits, eps=0.3, steps=5, num_draws=6)"
SURFACE = """
from atoplib.explorer import explore_surface
from tests.test_heatmaps import cells

explore_surface(cells(), title="masks")
"""


def find_chromium() -> str | None:
    """The browser's program, or None."""
    if named := os.environ.get("CHROMIUM"):
        return named
    downloads = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", "~/.cache/ms-playwright")).expanduser()
    installed = (found for name in NAMES if (found := shutil.which(name)))
    return next(installed, None) or next(map(str, sorted(downloads.glob("chromium-*/chrome-linux*/chrome"))), None)


CHROMIUM = find_chromium()
if CHROMIUM is None:
    pytest.skip("no Chromium was found: the explorer is not tested in a browser", allow_module_level=True)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is missing: the explorer is not tested in a browser"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """JupyterLab as `make lab` starts it, on a folder of its own with two notebooks: explorer, and surface of notebook 7."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "work").mkdir()
    for name, cells in (("explore", (SETUP, EXPLORE)), ("surface", (SURFACE,))):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
        nbformat.write(notebook, folder / "work" / f"{name}.ipynb")
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    names += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    environment = {**os.environ, **{name: str(folder / name) for name in names}, "PYTHONPATH": str(ROOT)}
    settings = folder / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--allow-root"]
    command += [f"--ServerApp.root_dir={folder / 'work'}", "--IdentityProvider.token=test", "--ServerApp.port_retries=0"]
    log = (folder / "log.txt").open("w")
    server = subprocess.Popen(command, env=environment, cwd=folder / "work", stdout=log, stderr=log)
    try:
        wait_for_port(port, server, folder / "log.txt")
        yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?token=test&reset"
    finally:
        server.terminate()
        try:
            server.wait(PATIENCE / 1000)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for_port(port: int, server: subprocess.Popen, log: Path) -> None:
    """Wait until the server answers."""
    ends = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < ends:
        assert server.poll() is None, log.read_text()[-2000:]
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not answer in {PATIENCE / 1000:.0f} s")


@pytest.fixture(scope="module")
def errors() -> list[str]:
    """What the browser's console complained of."""
    return []


@pytest.fixture(scope="module")
def page(address: str, errors: list[str]) -> Iterator:
    """The notebook after "Run All Cells", in a window of 1280 px."""
    with playwright.sync_playwright() as program:
        browser = program.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(viewport={"width": 1280, "height": 1250})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        run_all(page, ".atop-pictures img")
        yield page
        browser.close()


def choose(page, menu: str, *items: str) -> None:
    """Click through a menu of the menu bar."""
    page.locator(".lm-MenuBar-itemLabel").filter(has_text=re.compile(f"^{menu}$")).click()
    for item in items:
        page.locator(".lm-Menu-itemLabel").filter(has_text=re.compile(f"^{item}$")).click()


def wait_for_idle(page) -> None:
    """Wait until the kernel has nothing to do."""
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", state="attached")


def run_all(page, wanted: str) -> None:
    """Run all cells, and wait for what they show."""
    page.wait_for_selector("#jp-main-statusbar >> text=/[|] Idle$/")
    for patience in (10_000, 30_000, PATIENCE):  # what is asked of a kernel that is just being connected to can be lost
        choose(page, "Run", "Run All Cells")
        with suppress(playwright.TimeoutError):
            page.wait_for_function(STARTED, timeout=patience)
            break
    page.wait_for_selector(wanted)
    wait_for_idle(page)


def wait_for(page, *wanted: str) -> Knobs:
    """Wait until the pictures are current and their YAML, which names a data set, holds some lines; the knobs it names."""
    condition = """wanted => { const text = document.querySelector(".atop-yaml textarea")?.value ?? "";
        return !document.querySelector(".atop-stale") && wanted.every(line => text.includes(line)); }"""
    page.wait_for_function(condition, arg=["dataset: ", *wanted])
    text = page.locator(".atop-yaml textarea").input_value()
    return from_yaml(text, Knobs(dataset="", defence=""))


def wait_for_status(page, start: str) -> None:
    """Wait until the status line begins so."""
    condition = "start => [...document.querySelectorAll('[role=status]')].some(e => e.innerText.startsWith(start))"
    page.wait_for_function(condition, arg=start)


def sources(page) -> list[str]:
    """The bytes of every picture on screen."""
    return page.locator(".atop-pictures img").evaluate_all("images => images.map(image => image.src)")


def expected(knobs: Knobs) -> list[str]:
    """The bytes of the pictures that the library makes of the knobs, in this process."""
    names: dict = {}
    exec(SETUP, names)
    scene = compute.Scene({"mnist5k": names["digits"]}, names["defences"], ATTACKS)
    *_, view = compute.views(knobs, scene, compute.Memory())
    return [part.split('"')[0] for part in rendered.pictures(view).split('src="')[1:]]


def reset(page) -> Knobs:
    page.get_by_role("button", name="Reset").click()
    return wait_for(page, "steps: 5", "draw: 0", "image: 0", "attack: pgd", "missing_rate: 0.25", "defence: AToP")


def slider(page, name: str):
    """The handle of a slider: what the Tab key reaches."""
    return page.locator(".widget-slider", has=page.get_by_text(name, exact=True)).locator(".noUi-handle")


def keep(page, name: str) -> None:
    """Keep the page as a picture, if asked for."""
    if "SCREENSHOTS" in os.environ:
        for controls in page.locator(".atop-controls").all():
            controls.evaluate("element => element.scrollIntoView({block: 'start'})")
        page.screenshot(path=Path(os.environ["SCREENSHOTS"]) / f"{name}.png")


def test_the_numbers_on_screen_are_those_of_a_library_call_with_the_same_seed(page) -> None:
    reset(page)
    names: dict = {}
    exec(SETUP, names)
    defence, digits = names["defences"]["AToP"], names["digits"].test
    images, labels = digits.images[:1].float() / 255, digits.labels[:1]
    verdicts.reseed(defence, 0)
    generator = torch.Generator().manual_seed(0)
    adversarial = attacks.pgd(defence, images, labels, attacks.PGDSettings(eps=0.3, steps=5), generator=generator)
    verdicts.reseed(defence, 1)
    logits = verdicts.draw_logits(defence, adversarial, num_draws=6)[:, 0]
    for column, probabilities in (
        (1, defence.classifier(images)[0].softmax(dim=0)),
        (2, defence.classifier(adversarial)[0].softmax(dim=0)),
        (5, logits[0].softmax(dim=0)),
    ):
        shown = page.locator(f".atop-row figure:nth-child({column}) .atop-value").all_inner_texts()
        numbers = [float(text.split()[0]) for text in shown]
        assert numbers == pytest.approx((100 * probabilities).tolist(), abs=0.051)
    right = int((logits.argmax(dim=1) == labels).sum())
    assert f"{right} of 6 draws right" in page.locator(".atop-summary").inner_text()


def test_an_arrow_key_on_a_slider_changes_the_picture(page) -> None:
    reset(page)
    before = sources(page)
    slider(page, "eps (1/255)").press("ArrowRight")
    knobs = wait_for(page, f"eps: {77 / 255}")
    assert sources(page) != before and sources(page)[0] == before[0]
    assert sources(page) == expected(knobs)


def test_ten_quick_moves_end_in_the_picture_of_the_last(page) -> None:
    reset(page)
    handle = slider(page, "missing (%)")
    for _ in range(10):
        handle.press("ArrowRight")
    knobs = wait_for(page, "missing_rate: 0.35")
    assert sources(page) == expected(knobs)


def test_a_slow_attack_shows_its_progress_and_can_be_cancelled(page) -> None:
    reset(page)
    before = sources(page)
    page.get_by_role("button", name="Strict").click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('[role=status]')].some(e => /^Attack: [0-9]/.test(e.innerText))"
    )
    assert page.locator(".atop-stale").count() == 1
    keep(page, "busy")
    page.get_by_role("button", name="Cancel").click()
    wait_for_status(page, "Cancelled")
    time.sleep(1)
    assert sources(page) == before and page.locator(".atop-stale").count() == 1
    assert page.get_by_role("button", name="Cancel").is_disabled()
    reset(page)


def test_controls_have_names_and_those_that_do_not_apply_are_disabled(page) -> None:
    reset(page)
    page.get_by_label("defence").select_option("undefended")
    wait_for(page, "defence: undefended")
    for name in ("attack sees", "transform"):
        assert page.get_by_label(name, exact=True).is_disabled(), name
    assert page.get_by_role("button", name="Draw again").is_disabled()
    assert page.get_by_label("attack", exact=True).is_enabled()
    keep(page, "undefended")
    reset(page)
    assert page.get_by_label("transform", exact=True).is_enabled()


def test_the_parameters_can_be_copied_and_loaded(page) -> None:
    reset(page)
    page.get_by_role("button", name="Copy as papermill parameters").click()
    page.wait_for_selector("button:has-text('Copied')")
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert copied == page.locator(".atop-yaml textarea").input_value()
    page.locator(".atop-yaml textarea").fill("image: 7\nattack: fgsm")
    page.locator(".atop-yaml textarea").press("Tab")
    page.get_by_role("button", name="Set knobs from YAML").click()
    knobs = wait_for(page, "image: 7", "attack: fgsm")
    assert sources(page) == expected(knobs)


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_nothing_is_wider_than_the_window_in_either_theme(page, theme: str) -> None:
    choose(page, "Settings", "Theme", f"JupyterLab {theme}")
    page.wait_for_selector(f"body[data-jp-theme-name='JupyterLab {theme}']", state="attached")
    reset(page)
    page.get_by_label("transform", exact=True).select_option("RT3: noise, masks")
    wait_for(page, "transform: rt3")
    page.get_by_role("button", name="Robust accuracy over eps").click()
    page.wait_for_function("() => document.querySelectorAll('.atop-pictures svg').length == 2")
    keep(page, theme.lower())
    for selector in (".atop-controls", ".atop-pictures", ".jp-OutputArea-output"):
        widths = page.locator(selector).last.evaluate("element => [element.scrollWidth, element.clientWidth]")
        assert widths[0] <= widths[1], selector
    ground = "getComputedStyle(document.querySelector('.jp-Notebook')).backgroundColor"
    colours = page.locator(".atop-summary").evaluate(f"element => [getComputedStyle(element).color, {ground}]")
    light, dark = (sum(int(part) for part in colour.split("(")[1].rstrip(")").split(",")[:3]) for colour in colours)
    assert abs(light - dark) > 450, f"text and ground are too much alike: {colours}"


def test_run_all_while_an_attack_runs_gives_a_fresh_explorer(page) -> None:
    page.get_by_role("button", name="Strict").click()
    page.wait_for_selector(".atop-stale", state="attached")
    choose(page, "Run", "Run All Cells")
    knobs = wait_for(page, "steps: 5")
    assert sources(page) == expected(knobs)
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0


def test_a_restarted_kernel_gives_a_fresh_explorer_too_even_while_an_attack_runs(page) -> None:
    page.get_by_role("button", name="Strict").click()
    page.wait_for_selector(".atop-stale", state="attached")
    choose(page, "Kernel", "Restart Kernel and Run All Cells…")
    page.locator(".jp-Dialog .jp-mod-accept").click()
    knobs = wait_for(page, "steps: 5")
    assert sources(page) == expected(knobs)
    assert page.locator(".atop-yaml").count() == 1
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    slider(page, "eps (1/255)").press("ArrowRight")
    knobs = wait_for(page, f"eps: {77 / 255}")
    assert sources(page) == expected(knobs)


def test_the_still_is_hidden_where_the_explorer_is_alive(page) -> None:
    stills = page.locator("[class^=atop-still]")
    assert stills.count() == 1 and not stills.first.is_visible()


def test_the_surface_shows_the_numbers_of_the_cell_that_is_picked_by_mouse_or_keys(
    page, address: str, errors: list[str]
) -> None:
    surface = page.context.new_page()
    surface.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    surface.on("pageerror", lambda error: errors.append(str(error)))
    surface.goto(address.replace("explore.ipynb", "surface.ipynb"))
    surface.wait_for_selector(".jp-Notebook .jp-Cell")
    run_all(surface, ".atop-surface button")
    buttons = surface.locator(".atop-surface button")
    assert buttons.all_inner_texts() == ["25.0"] * 4
    surface.get_by_label("metric").select_option("clean accuracy")
    surface.wait_for_function("() => document.querySelector('.atop-surface button').innerText === '90.0'")
    surface.get_by_label("defence").select_option("AToP")
    surface.wait_for_function("() => document.querySelectorAll('.atop-surface button').length === 5")
    buttons.last.hover()
    surface.wait_for_function(  # a title is renewed after the hover
        "text => [...document.querySelectorAll('.atop-surface button')].at(-1).title.includes(text)",
        arg="robust accuracy, white-box: 50.0 % [25.0, 75.0]",
    )
    numbers = surface.locator("[role=status]").last
    buttons.last.click()
    surface.wait_for_selector(".atop-chosen:has-text('90.0') >> nth=0")
    surface.wait_for_function("() => [...document.querySelectorAll('[role=status]')].at(-1).innerText.includes('disjoint')")
    assert "50.0 % [25.0, 75.0]" in numbers.inner_text()
    buttons.first.focus()
    surface.keyboard.press("Enter")
    surface.wait_for_function("() => [...document.querySelectorAll('[role=status]')].at(-1).innerText.includes('25.0 %')")
    stills = surface.locator("[class^=atop-still]")
    assert stills.count() == 1 and not stills.first.is_visible()
    keep(surface, "surface")
    surface.close()


def test_the_console_holds_no_errors(page, errors: list[str]) -> None:
    assert errors == []
