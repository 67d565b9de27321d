"""How fast the explorer answers in a real browser: from a key press on a slider to the current picture.

    python -m benchmarks.explorer_latency [--repetitions 20]

JupyterLab and Chromium as in the browser tests; the kit's weights, on its digits and on noise of 32 px.
Each slider is moved to values that were not seen before, after one warm-up. On a machine with other work to
do the fastest repetition says more than the median. The result is Markdown.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median, quantiles

from tests.test_explorer_browser import CURRENT, jupyterlab, opened

SETUP = """import torch
torch.set_num_threads(2)
from atoplib import explore, load_pretrained
noise = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
"""
MNIST = "explore(rows=[{rows}], threat_model='{threat_model}')"
CIFAR10 = "explore({{'AToP': load_pretrained('cifar10', 'AToP')}}, noise, threat_model='{threat_model}')"
EPS, ALL = "\u2113\u221e \u03b5", "'undefended', 'AT', 'AP', 'AToP'"
CASES = {  # name: cell, slider, milliseconds aimed at
    "MNIST, AToP, missing, transfer": (MNIST.format(rows="'AToP'", threat_model="transfer"), "missing", 150),
    "MNIST, AToP, eps, PGD-10": (MNIST.format(rows="'AToP'", threat_model="white-box"), EPS, 300),
    "MNIST, four defences, eps, PGD-10": (MNIST.format(rows=ALL, threat_model="white-box"), EPS, 1200),
    "CIFAR-10, AToP, missing, transfer": (CIFAR10.format(threat_model="transfer"), "missing", 400),
    "CIFAR-10, AToP, eps, PGD-10": (CIFAR10.format(threat_model="white-box"), EPS, 900),
}  # fmt: skip
TURN = """(root, label) => new Promise(resolve => {
    const field = root.querySelector(`[aria-label="${label}"]`), started = performance.now();
    const watcher = new MutationObserver(() => {
        if (root.dataset.preview === "true") return;
        watcher.disconnect();
        resolve(performance.now() - started);
    });
    watcher.observe(root.querySelector(".atop-shown"), { childList: true });
    field.stepUp();
    for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind));
})"""
DRAG = """root => new Promise(resolve => {
    const field = root.querySelector('[aria-label="noise"]');
    let pictures = 0, moves = 0;
    new MutationObserver(() => pictures++).observe(root.querySelector(".atop-shown"), { childList: true });
    field.dispatchEvent(new Event("pointerdown"));
    const timer = setInterval(() => {
        if (moves++ % 20 < 10) field.stepUp(); else field.stepDown();
        field.dispatchEvent(new Event("input"));
        if (moves < 100) return;
        clearInterval(timer);
        field.dispatchEvent(new Event("pointerup"));
        resolve(pictures / 3);
    }, 30);
})"""


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="How fast the explorer answers in a browser.")
    parser.add_argument("--repetitions", type=int, default=20)
    repetitions = parser.parse_args().repetitions
    cells = [SETUP, *(cell for cell, _, _ in CASES.values())]
    print("| | fastest ms | median ms | 95th percentile ms | aim ms |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder, jupyterlab(Path(folder), cells) as address:
        with opened(address, len(CASES), print) as page:
            for number, (name, (_, label, aim)) in enumerate(CASES.items()):
                explorer, times = page.locator(".atop-live").nth(number), []
                for _ in range(repetitions + 1):
                    times.append(explorer.evaluate(TURN, label))
                    page.wait_for_function(CURRENT)
                times = times[1:]
                numbers = min(times), median(times), quantiles(times, n=20)[-1]
                print(f"| {name} | {' | '.join(f'{value:.0f}' for value in numbers)} | {aim} |")
            rate = page.locator(".atop-live").first.evaluate(DRAG)
            print(f"\nWhile dragging (MNIST, noise): {rate:.1f} pictures a second; aim 5.")


if __name__ == "__main__":
    main()
