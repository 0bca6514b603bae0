"""What templates inside of sentences show, in the larger Wikipedias: a table of their names, which can be added to."""

import re
from collections.abc import Mapping

# What a template shows, and the names of the templates that show it. "{label|1}" stands for the first of these arguments
# that is given. A template without any of them shows nothing. "s/2" is {{s}} with two arguments that have no names.
SHOWN = (
    # Text as it is, perhaps in another form or with a hint; doubtful statements, which keep their text.
    ("{1}", "nowrap|nobr|nobreak|nowr|s/1|abbr|abbrlink|tooltip|comment|small|smaller|midsize|big|large|larger|resize|em|"
            "strong|var|code|mono|kbd|samp|tt|key|key press|sc|sc1|smallcaps|small caps|allcaps|sub|sup|iast|unicode|"
            "polytonic|hebrew|arabic|visible anchor|vanchor|not a typo|as written|proper name|sic|nihongo|nihongo2|nihongo3|"
            "nihongo krt|flag|flagcountry|flagu|"
            "polytonisch|altgriechisch|dmg|arab|kapitälchen|"
            "refnec|référence nécessaire|refsou|référence souhaitée|référence insuffisante|passage non neutre|pc|"
            "petites capitales|citation nécessaire|"
            "versalita|esd|senza fonte|citazione necessaria|chiarire|tutto attaccato|maiuscoletto|"
            "carece de fontes|carece de fontes2|aut|fakt|kto|kiedy|kiedy?|kto?|przez kogo|kapitaliki|k|"
            "нет аи 2|-1|флагификация|by|要出典範囲|独自研究範囲|要校閲範囲|疑問点範囲|誰範囲|いつ範囲|要説明範囲|"
            "補助漢字フォント|jis2004フォント|cp932フォント|拡張漢字|機種依存文字|ruby|ruby-ja|ルビ|ふりがな|読み仮名|よみがな|"
            "僻字|僻字2|zy|نستعلیق|عدد|چر"),
    ("{2|text|texte|1}", "lang|lang2|langue|wikt-lang|wt|rtl-lang|ltr-lang|script|bahasa"),
    ("{3|2|1}", "transl|transliteration|translit|translita"),
    ("⟨{1}⟩", "angbr|angle bracket|angbr ipa"),
    ("“{1|text}”", "citation|\""),
    # Links to articles that exist in another wiki only.
    ("{lt|label|tekst|1}", "ill|illm|ill2|interlanguage link|interlanguage link multi|iwl|仮リンク|"
                     "link-interwiki|enlace interwiki"),
    ("{texte|fr|1|trad}", "lien"),
    ("{2|1}", "w|wp|wikipedia|wikt|нп|нп2|нп3|нп4|нп5|iw|не переведено|не переведено 2|не переведено 3|"
              "не переведено 5"),
    ("{d|3|1}", "le|link-en|link-de|link-fr|link-ja|link-es|link-it|link-ru|link-ko|link-pt|link-nl|link-vi|link-la|link-ar|"
                "link-pl|link-uk|internal link helper/en|ilh/en"),
    ("{4|3}", "tsl|internal link helper|ilh|illm2"),
    # Numbers with their units, dates and centuries.
    ("{1} {2}{3} {4}{5}", "unité|unite|nombre|nb|num"), ("{1}{2} siècle", "s/2"),
    ("{1} {2}", "unidad|unità|eenheid|jednostka|单位|単位"),
    ("{1} {u|3}", "m|misura"), ("{1}", "formatnum|fmtn|nts|liczba|formatnumber|zahl|format price|число"),
    ("As of {1}", "as of"), ("as of {1}", "as of lc"),
    ("c. {1}", "circa|c.|ca.|vers"), ("fl. {1}", "fl.|floruit"),
    ("{1} {2} {3}", "date|date-|jour|fecha"),
    ("{1}e siècle", "s-|siècle"), ("siglo {1}", "siglo"), ("século {1}", "séc|século"),
    ("n° {1}", "n°|numéro|nº"), ("1er", "1er"), ("1re", "1re"),
    # Titles of persons and ships.
    ("M. {1}", "m."), ("MM. {1}", "mm."), ("Mme {1}", "mme"), ("Mlle {1}", "mlle"), ("Mgr {1}", "mgr"),
    ("Dr {1}", "dr"), ("Pr {1}", "pr"), ("Me {1}", "me"), ("Sir {1}", "sir"),
    *((f"{ship.upper()} {{1}}", ship) for ship in
      "uss|hms|ss|hmas|hmcs|hmnzs|rms|mv|ms|sms|smu|usns|uscgc|usav|ins|jds|hnlms|hdms|hswms|gts|rv".split("|")),
    # Signs.
    (" ", "nbsp|spaces|space|sp|hsp|thinsp|thin space|hair space|pad|0|,"),
    (" – ", "snd|spnd|spaced ndash|spaced en dash|snds|ndsh"), ("–", "ndash|en dash|endash"),
    ("—", "mdash|mdashb|em dash|emdash"), (" · ", "·|middot|dot|•|bull|bullet|*|!·"), ("'", "'"), ("'s", "'s"),
    ("' \"", "' \""), ("\" '", "\" '"), ("'\"", "'\""), ("\"'", "\"'"), ("\"", "-\""), ("=", "="),
    ("", "zwj|zwnj|wbr|shy|zwsp"), ("av. J.-C.", "av jc|avjc|av. j.-c."), ("a.C.", "ac"), ("d.C.", "dc"),
    # Quotations and verse that stand apart.
    ("\n\n{text|quote|1}\n\n", "quote|blockquote|quotation|cquote|quote block|bquote|zitat|citaat|cita|citazione|cytat|"
                               "цитата|引用|引用文|citation bloc|poem|poemquote|poem quote|verse"),
)
TEMPLATES = {name: pattern for pattern, names in SHOWN for name in names.split("|")}

# Templates that show nothing of the sentence: notes and citations, pronunciation, coordinates, marks of what is to be
# improved, pictures of flags, anchors. Names that end with a question mark are such marks in many languages.
SILENT = re.compile(
    r"(?:template:|vorlage:|modèle:)?(?:"
    # notes and citations
    r"sfn\w*|harv\w*|efn\b.*|refn\w*|refnest|rp?|ref|ref-\w+|ref label|#tag:.*|#if.*cite.*|note\w*|note label|notetag|"
    r"cite|cite .*|citation .*|cita (?:web|libro|noticia|publicación|news|testo).*|cit[eo]er .*|cytuj.*|odn|uwaga|u|fn[bz]?|"
    r"lien web|ouvrage|article|chapitre|internetquelle|literatur|citar .*|notas?|nota de rodapé|harvref|harvnp|harvsp|"
    r"статья|книга|публикация|пк|یادکرد.*|پک|پاورقی|رف|یاد|isbn|issn|doi|subscription required|registration required|"
    r"closed access|open access|free access|webarchive|wayback|dead link|lien brisé|toter link|リンク切れ|脚注|出典の明記|"
    # pronunciation and coordinates
    r"ipa\w*(?:-.*|\b.*)|ipac-.*|api|afi|mfa|мфа|lautschrift|pronunciation|pron\w*|respell|audio|listen|звук|"
    r"phon|phonétique|آوا|الفبای آوانگاری|coord.*|coor .*|koord.*|координаты|مختصات|"
    # marks of what is to be improved
    r".* needed|.* needed\W.*|.*[ -]inline|.*\?|cn|fact|dubious|clarify|when|who|whom|which|what|where|why|how|by whom|"
    r"for whom|from whom|according to whom|vague|verify.*|failed verification|full|better source|specify|ambiguous|quantify|"
    r"disputed.*|pov[ -]statement|or|original research.*|synth|peacock.*|weasel.*|qualify evidence|undue.*|relevance|"
    r"inflation[-/]fn|citation requested|beleg.*|quelle|cita requerida|demostrar|cr|aclarar|quién|cuándo|dónde|qui|quoi|"
    r"quand|où|pas clair|précision nécessaire|lequel|citação necessária|bron|źródło|dopracować|нет аи|аи|уточнить|прояснить|"
    r"проверить|когда|факт|джерело|källa behövs|要出典|要ページ番号|要検証|疑問点|誰|いつ|どこ|なぜ|要説明|信頼性要検証|"
    r"出典無効|來源請求|来源请求|需要解释|谁|何时|來源|مدرک.*|نیازمند منبع|روشن‌سازی|چه کسی|کی|उद्धरण आवश्यक|प्रमाण|स्पष्ट करें|"
    # flags, anchors and what steers the layout
    r"flag ?icon.*|flagdeco|flagathlete|旗|anchors?|anker|ancre|ancla|âncora|kotwica|якорь|clear.*|-|toc.*|"
    r"use .* (?:dates|english)|short description|infobox.*|noteta.*|defaultsort:.*|displaytitle:.*|sortierung:.*|disambig.*|"
    r"nota disambigua|"
    r"stub|.*-stub|reflist|notelist|portal.*|(?:main|see|further|other uses?|about|for|redirect)(?: .*)?)")

PLACE = re.compile(r"\{([^{}]+)\}")
# What stands between the numbers of {{convert|5|to|10|km}}, and how it is shown.
RANGES = {"to": " to ", "to(-)": " to ", "and": " and ", "and(-)": " and ", "&": " and ", "or": " or ", "by": " by ",
          "x": " × ", "xx": " × ", "×": " × ", "+": " + ", "-": "–", "–": "–"}
NUMBER = re.compile(r"[\d.,/ −+-]+")


def shown_text(name: str, arguments: Mapping[str, str]) -> str | None:
    """What a template shows of its arguments, "" for a silent one; None if it isn't known. `name` is in small letters."""
    if name in ("convert", "cvt"):
        return converted_text(arguments)
    if name == "as of" and "lc" in arguments:
        name = "as of lc"
    unnamed = sum(map(str.isdigit, arguments))
    pattern = TEMPLATES.get(f"{name}/{unnamed}", TEMPLATES.get(name))
    if pattern is None:
        return "" if SILENT.fullmatch(name) else None
    if "{" not in pattern:
        return pattern
    places = PLACE.findall(pattern)
    values = {place: first_given(place, arguments) for place in places}
    if not any(values.values()):
        return ""
    return PLACE.sub(lambda place: values[place[1]], pattern).strip(" ")


def first_given(names: str, arguments: Mapping[str, str]) -> str:
    """The first of the arguments, whose names are parted by "|", that is given and not empty."""
    return next(filter(None, map(arguments.get, names.split("|"))), "")


def converted_text(arguments: Mapping[str, str]) -> str:
    """The measure of {{convert|5|km}}, {{convert|5|to|10|km}} or {{convert|5|ft|6|in}}."""
    values = [arguments.get(str(number), "") for number in range(1, 11)]
    measure = values.pop(0)
    while values[0] in RANGES and len(values) > 3:
        measure += RANGES[values.pop(0)] + values.pop(0)
    words = 1
    if NUMBER.fullmatch(values[1]) and values[2] and not NUMBER.fullmatch(values[2]):
        words = 3
    return " ".join([measure, *values[:words]]).strip()
