"""audit.html: escaped, self-contained, small, and in a real browser without a complaint, a request or a sideways scroll."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import audit_measures as made_up
import pytest
import torch
from PIL import Image

import bnfuse
from bnfuse.audit import Figure, report
from bnfuse.datasets import ArrayDataset

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_OWN = "not an origin"  # what a browser asks for on its own account, updates and the time, has as initiator in its log
WIDTHS = {"phone": 390, "desktop": 1280}
TITLES = [
    "Image quality",
    "Nearest neighbours",
    "Gradient matching attack",
    "Model memorisation attack",
    "Membership inference",
]


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """An audit with every verdict, on images whose name wants to be markup."""
    with pytest.MonkeyPatch.context() as patch:
        made_up.replace_measures(patch, made_up.gallery())
        private, synthetic, heldout = (ArrayDataset(*made_up.blobs(seed)) for seed in range(3))
        private.name = "<script>alert('private')</script>"
        synthetic.name = "s&m\"'>"
        return bnfuse.audit(private, synthetic, heldout, tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="module")
def page(audited):
    return audited.report.read_text()


class Reader(HTMLParser):
    """The tags of a page with their attributes, and the text of its headings and cells."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def section(page, measure):
    return re.search(rf'<section id="{measure}">.*?</section>', page, re.DOTALL)[0]


def words(markup):
    return " ".join(Reader(markup).text.split())


# ---- what it says ----


def test_nothing_that_a_name_says_becomes_markup(page):
    tags = Reader(page).tags
    assert not [tag for tag, _ in tags if tag in ("script", "iframe", "object", "form")]
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert "<script>alert('private')</script>" in Reader(page).text and "s&m\"'>" in Reader(page).text
    assert "<b>with a name that has no end</b>" in Reader(page).text


def test_it_fetches_nothing_and_says_so_to_the_browser(page):
    tags = Reader(page).tags
    addresses = [attributes[name] for _, attributes in tags for name in ("src", "href") if name in attributes]
    assert addresses and all(address.startswith(("data:", "#")) for address in addresses)
    assert "url(" not in page and "@import" not in page
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in tags


def test_it_begins_with_a_paragraph_for_everybody(page, audited):
    first = re.search(r"<main>\s*<p.*?</p>", page, re.DOTALL)[0]
    said = words(first)
    assert said.startswith("What was asked. 40 synthetic images are to be published in the place of 40 private ones")
    assert said.index("What was asked.") < said.index("What was found.") < said.index("What was not asked.")
    assert all(" ".join(part.split()) in said for part in audited.summary.values())


def test_void_is_shown_as_void(page):
    void = section(page, "gradients")
    assert "Void, not private." in words(void) and "no leak seen" not in words(void)
    assert "no nearer to private ones" not in words(void)  # what the measure concluded
    assert "as expected" not in words(void)  # its readings
    assert 'class="number struck"' in void and "failed (positive)" in words(void)
    assert "no nearer to private ones" in words(section(page, "neighbours"))


def test_every_verdict_has_a_word_and_a_sign(page):
    overview = re.search(r'<table class="overview">.*?</table>', page, re.DOTALL)[0]
    for row, verdict in (
        ("Nearest", "✓ no leak seen"),
        ("Membership", "✗ leak"),
        ("Gradient", "∅ void"),
        ("Tracing", "– not run"),
    ):
        assert re.search(rf"{row}[\w ]* {verdict}", words(overview)), row
    assert "--teacher" in words(section(page, "tracing"))


def test_a_failed_negative_control_is_said(page):
    assert "A negative control failed" in words(section(page, "memorisation"))
    assert "A negative control failed" not in words(section(page, "neighbours"))


def test_beside_the_attacks_on_training_stands_whom_they_strike(page):
    for measure in made_up.gallery():
        strikes = "Whom this attack strikes: whoever trains" in words(section(page, measure))
        assert strikes == (measure in ("memorisation", "gradients", "gan")), measure


def test_each_measure_says_how_to_make_it_again_and_what_it_bounds(page):
    for measure in ("quality", "neighbours", "gradients", "membership"):
        said = words(section(page, measure))
        assert f"measures=['{measure}']" in said and "What it does not bound What somebody learns who has seen" in said
        assert "passed (negative)" in said
    assert "held-out images, paired in the same way" in words(section(page, "quality"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (36.24, "36.2"),
        (0.01234, "0.0123"),
        (1438.0, "1,438"),
        (12345.6, "12,346"),
        (-0.5, "−0.500"),
        (1.25e-7, "1.25e−07"),
        (0.0, "0"),
        (float("inf"), "∞"),
        (float("nan"), "undefined"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert report.number(value) == text


def test_an_interval_has_the_decimals_of_its_figure():
    assert report.interval_text(Figure("x", 0.5, low=0.45678, high=1)) == "0.457 to 1.000"
    assert report.interval_text(Figure("x", 0.0, low=0.0, high=0.03621)) == "0 to 0.036"
    assert report.interval_text(Figure("x", 0.5)) == "" and report.figure_text(Figure("x", 12.5, unit="dB")) == "12.5 dB"


# ---- pictures ----


def test_pictures_are_inside_and_keep_their_pixels_where_they_are_small(page, audited):
    images = [attributes for tag, attributes in Reader(page).tags if tag == "img"]
    assert len(images) == 18 and all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert all(image["alt"] for image in images)


def test_large_pictures_are_made_small_enough(monkeypatch, tmp_path):
    noise = torch.randint(0, 256, (250, 1300, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(noise.numpy()).save(path, compress_level=1)
    for limit, width in ((7_000_000, 1300), (400_000, 900), (200_000, 600)):
        monkeypatch.setattr(report, "_PICTURE_BYTES", limit)
        shown = report.inlined(paths, tmp_path)
        assert list(shown) == ["0.png", "1.png", "2.png"]
        contents = [base64.b64decode(uri.partition("data:image/jpeg;base64,")[2]) for uri in shown.values()]
        assert sum(map(len, contents)) <= limit
        with Image.open(io.BytesIO(contents[0])) as picture:
            assert picture.width == width


def test_the_public_report_shows_no_private_image(page, audited):
    public = audited.public_report.read_text()
    shown = [attributes for tag, attributes in Reader(public).tags if tag == "img"]
    rows = "Original, synthetic and noised images, a row each. Private images are left out."
    assert [image["alt"] for image in shown] == [rows, "A gradient wider than any screen."] * 6
    pixels = base64.b64decode(shown[0]["src"].partition("base64,")[2])
    assert pixels == (audited.out / "pictures" / "quality-pairs-public.png").read_bytes()
    assert "Not for publication" in words(page) and "Not for publication" not in words(public)
    assert "are left out of this page" in words(public) and "are left out of this page" not in words(page)
    without_figures = lambda text: re.sub("<figure>.*?</figure>", "", text, flags=re.DOTALL)
    for measure in made_up.gallery():
        assert words(without_figures(section(public, measure))) == words(without_figures(section(page, measure)))


# ---- in a browser ----


def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)}); on Debian: apt install chromium")
    return found


def visit(path: Path, folder: Path, *options: str) -> tuple[str, list[str], list[str]]:
    """Opens a page in a headless browser → (its DOM, what the console said, what it asked the network for)."""
    net_log = folder / "net.json"
    command = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
        f"--log-net-log={net_log}",
        *options,
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(folder)})
    assert done.returncode == 0, done.stderr
    console = re.findall(r"CONSOLE.*", done.stderr)
    events = [event["params"] for event in json.loads(net_log.read_text())["events"] if "params" in event]
    requests = [e["url"] for e in events if "url" in e and e.get("initiator", _OWN) != _OWN]
    return done.stdout, console, [url for url in requests if not url.startswith(("file:", "data:"))]


def test_the_browser_tells_of_errors_and_requests(tmp_path):
    """The control of the tests below: a page that has both."""
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://127.0.0.1:9/picture.png"><script>console.error("oh"); undefined.x</script>')
    _, console, requests = visit(bad, tmp_path, "--dump-dom")
    assert any("oh" in line for line in console) and any("TypeError" in line for line in console)
    assert "http://127.0.0.1:9/picture.png" in requests


@pytest.mark.parametrize("screen", WIDTHS)
@pytest.mark.parametrize("which", ["report", "public_report"])
def test_it_opens_without_errors_or_requests(which, screen, audited, tmp_path):
    picture = tmp_path / f"{screen}.png"
    size = f"--window-size={WIDTHS[screen]},2000"
    dom, console, requests = visit(getattr(audited, which), tmp_path, size, f"--screenshot={picture}", "--dump-dom")
    assert console == [] and requests == []
    if dom:  # not every browser writes both
        headings = [
            html.unescape(re.sub("<[^>]*>", "", h)).split("\n")[0].strip() for h in re.findall("<h2.*?</h2>", dom, re.S)
        ]
        assert headings[0] == "All measures" and headings[-1] == "Set-up"
        assert all(any(heading.startswith(title) for heading in headings) for title in TITLES)
    with Image.open(picture) as shot:
        assert shot.width == WIDTHS[screen] and len(shot.convert("RGB").getcolors(2**24)) > 50  # something is drawn


def test_it_does_not_scroll_sideways_on_any_screen(page, tmp_path):
    """Measured in frames of each width, since a window cannot be as narrow as a phone everywhere."""
    frames = "".join(f'<iframe style="width:{width}px;height:900px" title="{name}"></iframe>' for name, width in WIDTHS.items())
    script = """
        const page = PAGE, widths = {};
        let left = document.querySelectorAll("iframe").length;
        for (const frame of document.querySelectorAll("iframe")) {
          frame.onload = () => {
            const root = frame.contentDocument.documentElement;
            const parts = [...frame.contentDocument.querySelectorAll("td, th, p, pre, img, h2, dd")];
            const outside = part => part.getBoundingClientRect().right > root.clientWidth + 1;
            const sideways = parts.filter(outside).map(part => part.outerHTML.slice(0, 99));
            widths[frame.title] = [root.scrollWidth, root.clientWidth, sideways];
            if (--left == 0) document.title = JSON.stringify(widths);
          };
          frame.srcdoc = page;
        }
    """
    outer = tmp_path / "frames.html"
    quoted = json.dumps(page).replace("</", "<\\/")
    outer.write_text(f"<!DOCTYPE html><meta charset=utf-8>{frames}<script>{script.replace('PAGE', quoted)}</script>")
    dom, _, _ = visit(outer, tmp_path, "--window-size=1800,2000", "--virtual-time-budget=20000", "--dump-dom")
    widths = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom, re.S)[1]))
    assert set(widths) == set(WIDTHS)
    for name, (scrolled, seen, sideways) in widths.items():
        assert scrolled <= seen and WIDTHS[name] - 20 <= seen <= WIDTHS[name] and sideways == [], name


def test_it_prints(audited, tmp_path):
    pdf = tmp_path / "audit.pdf"
    visit(audited.report, tmp_path, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    assert pdf.read_bytes().startswith(b"%PDF") and 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) <= 30


# ---- the page in docs/ ----


@pytest.fixture
def docs(monkeypatch, tmp_path):
    """`audit_page` with a copy of its page, and folders of its own."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import audit_page

    page = tmp_path / "audit.md"
    page.write_text(audit_page.PAGE.read_text())
    for name, value in {"PAGE": page, "PICTURES": tmp_path / "images", "RESULTS": tmp_path / "results"}.items():
        monkeypatch.setattr(audit_page, name, value)
    return audit_page


def test_an_audit_becomes_a_table_and_pictures_in_docs(docs, audited):
    docs.write_report(docs.keep(audited.out))
    written = docs.PAGE.read_text()
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    void = next(row for row in rows if row.startswith("| Gradient"))
    assert "~~0.100 dB (0.050 to 0.500)~~" in void and "**void**" in void and "failed where it had to succeed" in void
    assert any("**leak**" in row and "12 in 100" in row for row in rows)
    kept = {path.name for path in docs.PICTURES.iterdir()}
    assert kept >= {"quality-pairs-public.png", "quality-wide.png"} and not kept & {
        "quality-pairs.png",
        "quality-originals.png",
    }
    assert all(f"(images/audit/{name})" in written for name in kept)
    assert json.loads((docs.RESULTS / "audit.json").read_text())["budget"] == "quick"


def test_the_page_in_docs_shows_the_audit_that_is_kept(docs):
    kept = Path(docs.__file__).parent / "results" / "audit.json"
    if not kept.is_file():
        pytest.skip("no audit has been kept")
    before = docs.PAGE.read_text()
    docs.write_report(json.loads(kept.read_text()))
    assert docs.PAGE.read_text() == before, "run `python benchmarks/audit_page.py --report`"
