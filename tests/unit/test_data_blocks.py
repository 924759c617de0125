"""Each block of curation alone."""

from __future__ import annotations

import random

import numpy as np
import pytest

from stages.data.blocks import decontaminate, encoding, html, language, minhash, quality, split
from stages.data.document import Document
from stages.data.engine import select
from stages.data.formats.text import decode
from stages.data.text import units
from stages.data.words import ngrams

# Article 1 and the beginning of article 2 of the Universal Declaration of Human Rights.
RIGHTS = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and "
    "should act towards one another in a spirit of brotherhood. Everyone is entitled to all the rights and freedoms set forth "
    "in this Declaration, without distinction of any kind, such as race, colour, sex, language, religion, political opinion.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y conciencia",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione e di coscienza",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de consciência",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを授けられており、"
    "互いに同胞の精神をもって行動しなければならない。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며",
    "ar": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم بعضا بروح الإخاء",
    "zh": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。人人有资格享有本宣言所载的一切权利和自由,"
    "不分种族、肤色、性别、语言、宗教。",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem i sumieniem",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền. Mọi con người đều được tạo hoá ban cho lý trí",
    "nl": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd met verstand en geweten",
    "cs": "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv. Jsou nadáni rozumem a svědomím",
    "id": "Pemerintah sudah mengumumkan bahwa anak-anak di Jakarta tidak bisa pergi ke sekolah karena banjir besar kemarin",
    "uk": "Всі люди народжуються вільними і рівними у своїй гідності та правах. Вони наділені розумом і совістю",
    "ro": "Toate ființele umane se nasc libere și egale în demnitate și în drepturi. Ele sunt înzestrate cu rațiune și conștiință",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι προικισμένοι με λογική",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है",
    "he": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון, לפיכך חובה עליהם לנהוג איש ברעהו",
    "fa": "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند. همه دارای عقل و وجدان می‌باشند",
}
THAI = ("มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ "
        "ทุกคนย่อมมีสิทธิและอิสรภาพบรรดาที่กำหนดไว้ในปฏิญญานี้ โดยปราศจากความแตกต่างไม่ว่าชนิดใด ๆ ดังเช่น เชื้อชาติ ผิว เพศ ภาษา ศาสนา")


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"{rng.choice('bcdfglmnprst')}{rng.choice('aeiou')}{rng.randrange(100000)}" for _ in range(count))


def cleaned(block, text, domain="prose", markup="", language=""):
    document = Document("d", text, domain, language, markup=markup)
    return block.clean(document, block.Config()), document


@pytest.mark.parametrize("damaged, mended", [
    ("L'Ã©tÃ© arrive â€” câ€™est beau", "L'été arrive — c’est beau"),
    ("ÐŸÑ€Ð¸Ð²ÐµÑ‚, Ð¼Ð¸Ñ€", "Привет, мир"),
    ("こんにちは世界".encode().decode("latin-1"), "こんにちは世界"),
    ("one\r\ntwo\rthree\x00\x08", "one\ntwo\nthree"),
    ("caf&eacute; &amp; bar", "café & bar"),
    ("cafe\u0301", "café"),
    ("sound: “quoted” ﬁne №5 Ａ", "sound: “quoted” ﬁne №5 Ａ"),
])
def test_encoding_is_repaired(damaged, mended):
    reason, document = cleaned(encoding, damaged)
    assert (reason, document.text) == ("", mended)


def test_encoding_leaves_code_and_names_alone():
    text = 'x = "&amp; cafe\u0301"  # Ã is a letter\n'
    assert cleaned(encoding, text, "code")[1].text == text
    from stages.data.sources import cldr

    for document in cldr.documents([]):
        before = document.text
        assert encoding.clean(document, encoding.Config()) == "" and document.text == before


@pytest.mark.parametrize("code, charset", [
    ("ko", "cp949"), ("ru", "koi8-r"), ("uk", "cp1251"), ("ja", "shift_jis"), ("zh", "gb18030"), ("pl", "iso8859-2"),
    ("el", "cp1253"), ("he", "cp1255"), ("ar", "cp1256"), ("de", "cp1252"), ("zh", "utf-16"), ("fr", "utf-8-sig"),
])
def test_charsets_are_found(code, charset):
    assert decode(RIGHTS[code].encode(charset)) == RIGHTS[code]
    page = f"<html><head><meta charset='{charset}'></head><body>{RIGHTS[code][:20]}"
    assert charset.startswith("utf") or decode(page.encode(charset), html=True) == page


def test_encoding_removes_what_is_lost():
    assert cleaned(encoding, "\ufffd" * 10 + "word " * 10)[0].startswith("undecodable: 10 of 60")
    assert cleaned(encoding, " \x00\n")[0] == "empty"


def test_html():
    sentence = "The harbour was quiet that morning, and the boats lay still. "
    page = (f"<!doctype html><html><head><title>T</title><style>p{{}}</style></head><body><nav><ul><li><a href='/'>Start</a>"
            f"<li><a href='/b'>Shop</a></ul></nav><main><h1>A day</h1><p>{sentence * 5}</p><p>5 &lt; 6 &amp; so on</p></main>"
            "<script>alert(1)</script><footer>Copyright imprint</footer></body></html>")
    reason, document = cleaned(html, page, markup="html")
    assert reason == "" and document.markup == ""
    assert document.text.startswith("A day") and "5 < 6 & so on" in document.text and document.text.count("harbour") == 5
    assert not any(word in document.text for word in ("Shop", "alert", "imprint", "<p>"))
    drawing = f"<main><p>{sentence * 5}</p></main><svg>{'<path d=x/>' * 3000}</svg>"
    assert cleaned(html, drawing, markup="html")[0] == ""
    assert cleaned(html, "<div/>" * 3000 + "x", markup="html")[0].startswith("page nested too deep")
    bare = cleaned(html, "<div class='sidebar'>A bare page with a single block of text in it.</div>", markup="html")
    assert bare[0] == "" and "single block" in bare[1].text
    assert cleaned(html, "<html><body><img src=x></body></html>", markup="html")[0] == "page without text"
    assert cleaned(html, "<p>not a page</p>")[1].text == "<p>not a page</p>"


@pytest.mark.parametrize("code", RIGHTS)
def test_language_is_identified(code):
    reason, document = cleaned(language, RIGHTS[code])
    assert (reason, document.language) == ("", code)


def test_languages_not_wanted_go():
    assert cleaned(language, THAI)[0].startswith("language not wanted: th")
    assert cleaned(language, "x = 1", "code") == ("", Document("d", "x = 1", "code"))
    assert cleaned(language, "Monday: Montag", language="de")[1].language == "de"  # short: as declared
    assert cleaned(language, RIGHTS["en"] * 2, language="de")[1].language == "en"  # long: as found
    assert cleaned(language, "สวัสดี", "names", language="th")[0] == "language not wanted: th"


@pytest.mark.parametrize("code", ["en", "zh", "ja", "th"])
def test_good_prose_stays(code):
    text = RIGHTS.get(code, THAI)
    assert cleaned(quality, text, language=code)[0] == ""


@pytest.mark.parametrize("code", ["ar", "hi", "he", "fa", "ko", "vi", "ru", "el", "tr"])
def test_good_prose_of_every_script_stays(code):
    document = Document("d", RIGHTS[code], language=code)
    assert quality.clean(document, quality.Config(min_words=10)) == ""


@pytest.mark.parametrize("text, reason", [
    ("Too short.", "number of words: 2"),
    ("人人生而自由。", "number of words: 6"),
    (RIGHTS["en"] + " Lorem ipsum dolor sit amet.", "placeholder text"),
    (" ".join(f"#tag{i} and" for i in range(60)), "symbols"),
    (" ".join(f"{i}.{i} 1" for i in range(80)), "words without letters"),
    (" ".join("ab" for _ in range(80)), "mean word length: 2.0"),
    (" ".join(f"word{i}" for i in range(80)), "no function words"),
    ("\n".join(f"- {line}" for line in RIGHTS["en"].split(". ")), "lines: 3 bullets"),
    ("the cat and the dog sat on the mat.\n" * 20, "repeated lines"),
    ("The cat sat with the dog in that house of theirs and " * 12, "repeated"),
    ("人民的权利和自由不分种族" * 20, "repeated"),
])
def test_bad_prose_goes(text, reason):
    assert cleaned(quality, text, language="zh" if "人" in text else "en")[0].startswith(reason)


def test_boilerplate_lines_go():
    reason, document = cleaned(quality, "Please enable JavaScript to see this.\n" + RIGHTS["en"], language="en")
    assert (reason, document.text) == ("", RIGHTS["en"])


@pytest.mark.parametrize("text, reason", [
    ("x = 1\n", "code too short"),
    ("data = '" + "a" * 2000 + "'\n", "code lines too long"),
    ("[" + "\n".join("0x00, 0x01, 0x02, 0x03," for _ in range(40)) + "]", "code is data"),
    ("# Code generated by protoc. DO NOT EDIT.\n" + "def f(value):\n    return value\n" * 10, "generated code"),
    ("def function(argument):\n    return argument + 1\n" * 5, ""),
])
def test_code_rules(text, reason):
    assert cleaned(quality, text, "code")[0].startswith(reason) and bool(cleaned(quality, text, "code")[0]) == bool(reason)


def test_exact_duplicates():
    texts = ["One  text\n", "one text", "ｏｎｅ text", "another"]
    reasons = select("exact", [Document(str(i), text) for i, text in enumerate(texts)], None)
    assert reasons == ["", "same text: 0", "same text: 0", ""]


def similar(base: str, fraction: float, seed: int) -> str:
    """`base` with the given fraction of its end rewritten."""
    cut = int(len(base) * (1 - fraction))
    return base[:cut] + words(seed, 4000)[: len(base) - cut]


def test_near_duplicates_go_and_others_stay():
    bases = [words(i, 400) for i in range(60)]
    close = [similar(base, 0.01, 1000 + i) for i, base in enumerate(bases)]
    far = [similar(base, 0.6, 2000 + i) for i, base in enumerate(bases)]
    documents = [Document(f"{kind}{i}", text) for kind, texts in (("base", bases), ("close", close), ("far", far))
                 for i, text in enumerate(texts)]
    reasons = select("minhash", documents, minhash.Config())
    assert reasons[:60] == [""] * 60 and reasons[120:] == [""] * 60  # never a document that shares 40 %
    assert sum(map(bool, reasons[60:120])) >= 57  # Jaccard 0.98: P = 1-(1-0.98^16)^8 = 0.9999
    assert all(reason in ("", f"near-duplicate: base{i}") for i, reason in enumerate(reasons[60:120]))


@pytest.mark.parametrize("jaccard", [0.8, 0.9])
def test_the_curve_of_the_bands(jaccard):
    """Pairs of known similarity meet as often as 1-(1-s^16)^8 says: 0.20 at 0.8, 0.81 at 0.9."""
    pairs, rng = 400, np.random.default_rng(0)
    size, config = 500, minhash.Config(characters=1)
    shared = round(2 * size * jaccard / (1 + jaccard))
    met = 0
    texts = []
    for _ in range(pairs):  # sets of characters: with 1-grams, a text is a set
        pool = rng.choice(np.arange(0x4E00, 0x9FA5), 2 * size - shared, replace=False)
        for part in (pool[:size], pool[size - shared :]):
            texts.append("".join(map(chr, part)))
    bands = minhash.signatures(texts, config).reshape(pairs, 2, 8, 16)
    met = (bands[:, 0] == bands[:, 1]).all(-1).any(-1).mean()
    expected = 1 - (1 - jaccard**16) ** 8
    assert abs(met - expected) < 4 * (expected * (1 - expected) / pairs) ** 0.5


def test_components_are_transitive_and_sources_can_be_kept_apart():
    base = words(1, 2000)
    documents = [Document("a", base, source="x"), Document("b", base + " end", source="x"), Document("c", base, source="y")]
    assert select("minhash", documents, minhash.Config()) == ["", "near-duplicate: a", "near-duplicate: a"]
    assert select("minhash", documents, minhash.Config(cross_source=True)) == ["", "", "near-duplicate: a"]
    assert select("minhash", [], minhash.Config()) == []
    assert select("minhash", [Document("e", ""), Document("f", "x")], minhash.Config()) == ["", ""]


def test_signatures_stand_alone_and_keep_numbers():
    table = [" ".join(f"row {i} costs {(i * seed) % 97}" for i in range(200)) for seed in (31, 53)]
    alone = [minhash.signatures([text], minhash.Config())[0] for text in (" a b c " * 40, *table)]
    together = minhash.signatures([" a b c " * 40, *table], minhash.Config())
    assert np.array_equal(minhash.signatures(["x ", " a b c " * 40], minhash.Config())[1], alone[0]) and np.array_equal(together, alone)
    documents = [Document(str(i), text) for i, text in enumerate([*table, "1", "22", "...", "!!!", "No. 1", "No. 2"])]
    assert select("minhash", documents, minhash.Config()) == [""] * 8
    assert select("minhash", documents, minhash.Config(fold_digits=True))[:3] == ["", "near-duplicate: 0", ""]


def test_numbers_tell_ngrams_apart():
    grams = [next(ngrams([f"what is {a} plus {b} in words"], 7))[0].tolist() for a, b in ((12, 34), (12, 34), (56, 78))]
    assert grams[0] == grams[1] != grams[2]


def test_only_what_is_split_here_counts():
    documents = [Document(str(i), words(i, 20), split="" if i < 2 else "benchmark") for i in range(40)]
    select("split", documents, split.Config(heldout=1e-9))
    assert sorted(document.split for document in documents[:2]) == ["heldout", "train"]


def test_split_by_content_and_group():
    def sides(count, **values):
        documents = [Document(str(i), words(i, 20), group=f"g{i // 2}" if i < 100 else "") for i in range(count)]
        assert select("split", documents, split.Config(**values)) == [""] * count
        return [document.split for document in documents]

    large, small = sides(1000, heldout=0.2), sides(300, heldout=0.2)
    assert large[:300] == small  # more documents change no side
    assert 150 < large.count("heldout") < 250 and set(large) == {"train", "heldout"}
    assert all(large[i] == large[i + 1] for i in range(0, 100, 2))
    assert sides(300, heldout=0.2, seed=1) != small
    assert sides(1, heldout=0.01) == ["train"] and sides(6, heldout=0.0001).count("heldout") == 2  # one group of two
    assert sides(6, heldout=0.0) == ["train"] * 6


def test_decontamination():
    secret, other = words(1, 100), words(2, 300)
    documents = [
        Document("whole", secret, split="train"),
        Document("inside", f"{words(3, 2000)} {secret} {words(4, 2000)}", split="train"),
        Document("case", secret.upper().replace(" ", ",  "), split="train"),
        Document("a little", f"{other} {' '.join(secret.split()[:20])}", split="train"),
        Document("free", other, split="train"),
        Document("secret", secret, split="heldout"),
        Document("bench", " ".join(other.split()[100:130]), split="benchmark"),
    ]
    reasons = select("decontaminate", documents[:-1], decontaminate.Config())
    assert [reason.partition(":")[0] for reason in reasons] == ["overlap with heldout"] * 3 + [""] * 3
    reasons = select("decontaminate", documents, decontaminate.Config())
    assert reasons[4] == "overlap with benchmark: bench (100%)"
    assert select("decontaminate", documents[:1], decontaminate.Config()) == [""]


def test_units_of_every_script():
    assert units("don't stop-me now, 3.5 times") == ["don", "t", "stop", "me", "now", "3", "5", "times"]
    assert units("我爱Python编程。") == ["我", "爱", "Python", "编", "程"]
    assert units("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    counts = [[len(hashes) for hashes, _ in ngrams([text], 3)] for text in ("a b c d", "a b", "A, b; c")]
    assert [sum(count) for count in counts] == [2, 0, 1]
    assert next(ngrams(["x y. a, b c"], 3))[0][2] == next(ngrams(["A b  C"], 3))[0][0]
