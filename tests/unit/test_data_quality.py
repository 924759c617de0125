"""How well curation reads pages and tells languages, on texts whose answer is known; the peers' are in infra/bench."""

from __future__ import annotations

from itertools import count, islice

import pytest

from stages.data.blocks import html, language
from stages.data.document import Document

from pages import KINDS, Page, pages  # isort: skip
from test_data_blocks import RIGHTS  # isort: skip
from test_data_curate import prose  # isort: skip

# Messages that programs show, by language.
SHORT = {
    "en": ["Could not open the file", "Are you sure that you want to delete it?"],
    "fr": ["Impossible d’ouvrir le fichier", "Voulez-vous vraiment le supprimer ?"],
    "es": ["No se pudo abrir el archivo", "¿Está seguro de que quiere eliminarlo?"],
    "it": ["Impossibile aprire il file", "Si vuole davvero eliminare questo elemento?"],
    "de": ["Die Datei konnte nicht geöffnet werden", "Soll das wirklich gelöscht werden?"],
    "pt": ["Não foi possível abrir o arquivo", "Você tem certeza de que quer excluí-lo?"],
    "ja": ["ファイルを開けませんでした", "本当に削除してもよろしいですか?"],
    "ko": ["파일을 열 수 없습니다", "정말로 삭제하시겠습니까?"],
    "ar": ["تعذر فتح الملف المطلوب", "هل أنت متأكد من أنك تريد حذفه؟"],
    "zh": ["无法打开这个文件", "您确定要删除它吗?"],
    "ru": ["Не удалось открыть файл", "Вы действительно хотите удалить его?"],
    "pl": ["Nie można otworzyć pliku", "Czy na pewno chcesz go usunąć?"],
    "tr": ["Dosya açılamadı, lütfen yeniden deneyin", "Silmek istediğinizden emin misiniz?"],
    "vi": ["Không thể mở tập tin này", "Bạn có chắc chắn muốn xóa nó không?"],
    "nl": ["Het bestand kon niet worden geopend", "Weet u zeker dat u het wilt verwijderen?"],
    "cs": ["Soubor se nepodařilo otevřít", "Opravdu jej chcete smazat?"],
    "id": ["Tidak dapat membuka berkas ini", "Apakah Anda yakin ingin menghapusnya?"],
    "uk": ["Не вдалося відкрити цей файл", "Ви справді хочете його вилучити?"],
    "ro": ["Fișierul nu a putut fi deschis", "Sigur doriți să îl ștergeți?"],
    "el": ["Δεν ήταν δυνατό το άνοιγμα του αρχείου", "Θέλετε σίγουρα να το διαγράψετε;"],
    "hi": ["फ़ाइल नहीं खोली जा सकी", "क्या आप वाकई इसे हटाना चाहते हैं?"],
    "he": ["לא ניתן לפתוח את הקובץ", "האם אתה בטוח שברצונך למחוק אותו?"],
    "fa": ["پرونده را نمی‌توان باز کرد", "آیا مطمئن هستید که می‌خواهید آن را حذف کنید؟"],
}


def identified(text: str) -> str:
    document = Document("d", text)
    reason = language.clean(document, language.Config())
    return reason or document.language


def test_short_texts():
    found = {(code, text): identified(text) for code, texts in SHORT.items() for text in texts}
    wrong = {key: answer for key, answer in found.items() if answer != key[0]}
    assert len(found) == 46 and len(wrong) <= 2, wrong  # of thousands of messages 97 % are right: see infra/bench


@pytest.mark.parametrize("code", [code for code in RIGHTS if code != "en"])
def test_mixed_texts_have_the_language_of_most_of_them(code):
    text = " ".join([*[RIGHTS[code]] * 2, *SHORT[code], "See the “User Guide”, section 4.2.", *SHORT["en"]])
    assert identified(text) == code


def test_languages_not_wanted_are_told_from_their_neighbours():
    texts = {"sv": "Alla människor är födda fria och lika i värde och rättigheter. De är utrustade med förnuft och samvete.",
             "hu": "Minden emberi lény szabadon születik és egyenlő méltósága és joga van. Az emberek ésszel bírnak.",
             "bg": "Всички хора се раждат свободни и равни по достойнство и права. Те са надарени с разум и съвест.",
             "fi": "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on annettu järki."}  # fmt: skip
    for code, text in texts.items():
        assert identified(text).startswith(f"language not wanted: {code}")
        document = Document("d", text)
        assert language.clean(document, language.Config(languages=[code])) == "" and document.language == code


def made(number: int) -> list[Page]:
    paragraphs = (prose(i, 40 + i % 60).strip() for i in count())
    return list(islice(pages(paragraphs), number))


def test_no_main_text_is_lost_and_little_else_stays():
    """Ten kinds of page: every piece of the main text comes through, in order, and most of the rubble does not."""
    rubble = [0, 0]
    for page in made(3 * len(KINDS)):
        document = Document("d", page.html, markup="html")
        assert html.clean(document, html.Config()) == ""
        text = " ".join(document.text.split())
        places = [text.find(" ".join(piece.split())) for piece in page.main]
        assert min(places) >= 0 and places == sorted(places), page.kind
        assert "gtag" not in text and "display:none" not in text and "<" not in text
        rubble[0] += sum(piece in text for piece in page.rubble)
        rubble[1] += len(page.rubble)
    assert rubble[0] <= 0.15 * rubble[1], rubble
