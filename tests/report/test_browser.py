"""The page in a real browser: as wide as a phone and as a screen, light and dark."""

import html
import re
import shutil
import subprocess

import pytest

from mod_kernels.bench import store
from mod_kernels.report import make

from . import made

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
# It may look for nothing on the network.
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --hide-scrollbars"
SCHEMES = {"dark": 0, "light": 1}  # as blink numbers them
# A page in a frame, for a window can't be as narrow as a phone: how wide it is laid out, how wide it may be, how
# many elements stand out of it, and how many pictures have no height.
FRAME = """<iframe style="width:%dpx;height:1600px;border:0" srcdoc="%s"></iframe>
<script>addEventListener("load", () => {
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  const right = one => one.getBoundingClientRect().right, height = one => one.getBoundingClientRect().height;
  const free = [...page.querySelectorAll("body *")].filter(one => !one.parentElement.closest(".scroll"));
  const outside = free.filter(one => right(one) > view.innerWidth + 1);
  const flat = [...page.querySelectorAll("figure svg")].filter(one => height(one) < 50);
  const width = page.documentElement.scrollWidth;
  document.title = `measured ${width} ${view.innerWidth} ${outside.length} ${flat.length}`;
})</script>"""


def browse(page, folder, width, scheme, *more):
    profile = folder / f"profile-{width}-{scheme}-{len(more[0])}"
    window = [f"--window-size={width},1600", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"]
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", *window, *more, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    made.save_all(made.every_suite(), folder / "results")
    long_name = made.GPU_MACHINE | {"gpu": "Graphics 9000 " + "Extra" * 20}
    store.save(made.results("block", made.cell(2.0, 1.0), machine=long_name), folder / "results" / "gpu.jsonl")
    (folder / "results" / "cut.jsonl").write_text('{"schema"')
    make([folder / "results"], folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_drawn_on_its_ground_and_written_in_the_other_shade(page, tmp_path, width, scheme):
    browse(page, tmp_path, width, scheme, f"--screenshot={tmp_path / 'shot.png'}")
    with Image.open(tmp_path / "shot.png") as shot:
        image = shot.convert("RGB")
    assert image.width == width
    ground = image.getpixel((2, image.height - 2))
    assert max(ground) < 50 if scheme == "dark" else min(ground) > 240
    shades = [(sum(colour) / 3, count) for count, colour in image.getcolors(image.width * image.height)]
    against = sum(count for shade, count in shades if (shade > 170 if scheme == "dark" else shade < 90))
    assert against > 0.005 * image.width * image.height  # text, and the lines of pictures
    colourful = sum(count for count, colour in image.getcolors(1 << 24) if max(colour) - min(colour) > 90)
    assert colourful > 500  # marks of pictures


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_the_page_never_scrolls_sideways(page, tmp_path, width):
    # Opened, the widest tables are there too.
    opened = page.read_text().replace("<details", "<details open")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % (width, html.escape(opened)))
    seen = browse(frame, tmp_path, 1400, "light", "--dump-dom")
    measured = re.search(r"measured (\d+) (\d+) (\d+) (\d+)", seen)
    assert measured is not None
    assert [int(one) for one in measured.groups()] == [width, width, 0, 0]
