"""How well curation reads pages and tells languages, beside its peers, in one run; with the speed of each, CPU time a core.

    /tmp/peers/bin/pip install trafilatura readability-lxml justext resiliparse pycld2 lingua-language-detector py3langid
    python infra/bench/curation_quality.py --peers /tmp/peers/bin/python [--pages 200] [pages] [languages]

pages      main text of the ten kinds of page of tests/unit/pages.py, filled with paragraphs of prose: precision and
           recall of its words, the share of its pieces that are whole, and the share of the rubble that is left
languages  the translations of the programs of this Debian (gettext catalogues in /usr/share/locale), known by language:
           messages of 20 to 60 characters ("short"), 600 and 2000 characters of them ("long", "page"), and 600 with
           every third message in English ("mixed"). unwanted: 24 other languages, of which the share is given that is
           not taken for one of the 23
"""

import argparse
import gettext
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
LANGUAGES = "en fr es it de pt ja ko ar zh ru pl tr vi nl cs id uk ro el hi he fa".split()
OTHERS = "th sv da fi hu bg sr hr sk ca gl bn ta ms et lt lv sl eo af nb ka hy mr".split()
FOLDERS = {"zh": "zh_CN", "pt": "pt_BR", "en": "fr"}  # English is what the French is a translation of
CATALOGUES = ("gtk30 gtk30-properties glib20 coreutils git systemd gnupg2 apt libc gsettings-desktop-schemas PackageKit"
              " system-config-printer software-properties sudo wget bash findutils").split()  # fmt: skip
SCRIPTS = "ja ko ar zh ru uk el hi he fa".split()  # a message with much Latin in it is half English
NO_MESSAGE = re.compile(r"[%<>\\={}|\]\[/$]|--")


def messages(language: str) -> list[str]:
    """Translated messages without placeholders, each once, shuffled."""
    found: dict[str, None] = {}
    for name in CATALOGUES:
        path = Path("/usr/share/locale", FOLDERS.get(language, language), "LC_MESSAGES", f"{name}.mo")
        try:
            with open(path, "rb") as file:
                catalogue = gettext.GNUTranslations(file)._catalog
        except (OSError, UnicodeDecodeError):
            continue
        for key, value in catalogue.items():
            key = (key[0] if isinstance(key, tuple) else key).split("\x04")[-1]
            text = " ".join((key if language == "en" else value).split()).replace("_", "")
            latin = len(re.findall("[A-Za-z]", text))
            if key != value and len(text) >= 20 and not NO_MESSAGE.search(text) and (language not in SCRIPTS or latin < 0.2 * len(text)):
                found[text] = None
    rows = list(found)
    random.Random(0).shuffle(rows)
    return rows


def language_set() -> dict[str, list[tuple[str, str]]]:
    """Kind of text -> (language, text); a language with fewer than 30 messages is left out."""
    english, sizes = messages("en"), {"long": 600, "mixed": 600, "page": 2000}
    found = {prefix + kind: [] for prefix in ("", "unwanted ") for kind in ("short", *sizes)}
    del found["unwanted mixed"]
    for language in LANGUAGES + OTHERS:
        texts, prefix = messages(language), "" if language in LANGUAGES else "unwanted "
        if len(texts) < 30:
            continue
        found[f"{prefix}short"] += [(language, text) for text in texts if len(text) <= 60][:200]
        for kind in ["long", "page", *([] if prefix or language == "en" else ["mixed"])]:
            part, made = [], 0
            for i, text in enumerate(texts):
                part.append(text.rstrip(".。") + ("。" if language in ("zh", "ja") else "."))
                if kind == "mixed" and i % 3 == 2:
                    part.append(english[i % len(english)].rstrip(".") + ".")
                if sum(map(len, part)) > sizes[kind]:
                    found[prefix + kind].append((language, " ".join(part)))
                    part, made = [], made + 1
                if made == 30:
                    break
    return found


def identifier(name: str):
    """A function text -> language, "-" for none of the 23."""
    if name == "cuvee":
        from stages.data.blocks import language
        from stages.data.document import Document

        def ours(text):
            document = Document("x", text)
            return "-" if language.clean(document, language.Config()) else document.language

        return ours
    if name == "py3langid":
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        return lambda text: model.classify(text)[0]
    if name == "cld2":
        import pycld2

        names = {"iw": "he", "zh-Hant": "zh"}

        def cld2(text):
            try:
                found = pycld2.detect(text, bestEffort=True)[2][0][1]
            except pycld2.error:
                return "-"
            return names.get(found, found)

        return cld2
    from lingua import LanguageDetectorBuilder

    detector = LanguageDetectorBuilder.from_all_languages().build()
    return lambda text: found.iso_code_639_1.name.lower() if (found := detector.detect_language_of(text)) else "-"


def run_languages(name: str, file: Path) -> dict:
    identify, found = identifier(name), {}
    for kind, rows in json.loads(file.read_text()).items():
        for _, text in rows[:20]:
            identify(text)
        started = time.process_time()
        answers = [identify(text) for _, text in rows]
        seconds = time.process_time() - started
        if kind.startswith("unwanted"):
            right = [answer not in LANGUAGES for answer in answers]
        else:
            right = [answer == language for answer, (language, _) in zip(answers, rows, strict=True)]
        wrong = Counter(f"{language}>{answer}" for answer, (language, _), good in zip(answers, rows, right, strict=True) if not good)
        size = sum(len(text.encode()) for _, text in rows)
        found[kind] = {"n": len(rows), "accuracy": sum(right) / len(rows), "MB/s": size / 1e6 / seconds, "wrong": wrong.most_common(4)}
    return found


def extractor(name: str):
    """A function page -> text."""
    if name == "cuvee":
        from stages.data.blocks import html
        from stages.data.document import Document

        def ours(page):
            document = Document("x", page, markup="html")
            return "" if html.clean(document, html.Config()) else document.text

        return ours
    if name == "resiliparse":
        from resiliparse.extract.html2text import extract_plain_text

        return lambda page: extract_plain_text(page, main_content=True)
    if name == "trafilatura":
        import trafilatura

        return lambda page: trafilatura.extract(page) or ""
    if name == "justext":
        import justext

        stops = justext.get_stoplist("English")
        return lambda page: "\n".join(one.text for one in justext.justext(page.encode(), stops) if not one.is_boilerplate)
    from lxml import html as lxml_html
    from readability import Document as Readable

    return lambda page: lxml_html.fromstring(Readable(page).summary()).text_content()


def run_pages(name: str, file: Path) -> dict:
    extract, rows = extractor(name), json.loads(file.read_text())
    extract(rows[0]["html"])
    started = time.process_time()
    texts = [extract(row["html"]) for row in rows]
    seconds = time.process_time() - started
    precision, recall, whole, left = [], [], [0, 0], [0, 0]
    for row, text in zip(rows, texts, strict=True):
        wanted, given = Counter(" ".join(row["main"]).split()), Counter(text.split())
        common = (wanted & given).total()
        precision.append(common / max(given.total(), 1))
        recall.append(common / wanted.total())
        flat = " ".join(text.split())
        for counts, pieces in ((whole, row["main"]), (left, row["rubble"])):
            counts[0] += sum(" ".join(piece.split()) in flat for piece in pieces)
            counts[1] += len(pieces)
    p, r = (sum(values) / len(values) for values in (precision, recall))
    return {"precision": p, "recall": r, "f1": 2 * p * r / (p + r), "pieces whole": whole[0] / whole[1], "rubble left": left[0] / left[1],
            "MB/s": sum(len(row["html"].encode()) for row in rows) / 1e6 / seconds}  # fmt: skip


def run(python: str, what: str, name: str, file: Path) -> dict:
    """One measurement in a process of its own: its last line of output."""
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "HOME": tempfile.gettempdir()}
    done = subprocess.run([python, __file__, "--inside", f"run_{what}", name, str(file)], capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def page_set(count: int) -> list[dict]:
    sys.path[:0] = [str(ROOT / "tests/unit"), str(ROOT / "infra/bench")]
    from curation import prose
    from pages import pages

    paragraphs = (paragraph for text in prose(10_000 * count) for paragraph in text.split("\n"))
    return [vars(page) for page, _ in zip(pages(paragraphs), range(count), strict=False)]


PEERS = {"pages": ["resiliparse", "trafilatura", "readability", "justext"], "languages": ["py3langid", "cld2", "lingua"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["pages", "languages"])
    parser.add_argument("--peers", default="", help="a Python with the peers")
    parser.add_argument("--pages", type=int, default=200)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        what, name, file = args.what
        print("\n" + json.dumps(globals()[what](name, Path(file))))
        return
    with tempfile.TemporaryDirectory() as folder:
        for what in args.what:
            file = Path(folder, what)
            file.write_text(json.dumps(page_set(args.pages) if what == "pages" else language_set()))
            for name in ["cuvee", *(PEERS[what] if args.peers else [])]:
                found = run(sys.executable if name == "cuvee" else args.peers, what, name, file)
                if what == "pages":
                    print(f"pages {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)
                for kind, one in found.items() if what == "languages" else []:
                    print(f"{kind} {name}: {one['accuracy']:.1%} of {one['n']}, {one['MB/s']:.2f} MB/s, {one['wrong']}", flush=True)


if __name__ == "__main__":
    main()
