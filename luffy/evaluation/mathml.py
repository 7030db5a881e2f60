"""LaTeX in texts -> HTML with MathML, which browsers draw without any script.

Texts come from models and files: whatever is no formula is escaped, and a formula is written anew from the few elements
and attributes of MathML that are known to be harmless.
"""

import re
from html import escape
from importlib.resources import files
from xml.etree import ElementTree

from markupsafe import Markup

LONGEST_FORMULA = 2000
"""Of a formula, characters; a longer one stays as it is written."""
ELEMENTS = """
    math mrow mi mn mo ms mtext mspace mfrac msqrt mroot msup msub msubsup munder mover munderover mtable mtr mtd mstyle
    mpadded mphantom menclose mmultiscripts mprescripts none
"""
ATTRIBUTES = """
    display mathvariant stretchy fence separator form accent lspace rspace width height depth linethickness columnalign
    rowspacing columnspacing minsize maxsize displaystyle scriptlevel notation movablelimits
"""
_FORMULA = re.compile(
    r"\$\$(?P<a>.+?)\$\$|\\\[(?P<b>.+?)\\\]|\\\((?P<c>.+?)\\\)|(?<![\\$])\$(?P<d>[^$\n]+?)(?<!\\)\$"
    r"|(?P<e>\\boxed\{(?!\s*\})(?:[^{}\n]|\{(?:[^{}\n]|\{[^{}\n]*\})*\})*\})|(?P<f>\\begin\{(?P<env>[a-z]+\*?)\}.+?\\end\{(?P=env)\})",
    re.DOTALL,
)
_SPACE = "{http://www.w3.org/1998/Math/MathML}"


def typeset(text: str) -> Markup:
    """A text whose formulas stand between dollars, \\( \\), \\[ \\], or in a box or an environment."""
    made, at = [], 0
    for found in _FORMULA.finditer(text):
        latex = next(found.group(name) for name in "abcdef" if found.group(name))
        drawn = formula(latex, block=bool(found.group("a") or found.group("b")))
        made += [escape(text[at : found.start()]), drawn or escape(found.group())]
        at = found.end()
    return Markup("".join([*made, escape(text[at:])]))


def formula_style() -> str:
    """The rules that a page needs to show what `typeset` made."""
    return (files("luffy.evaluation") / "formulas.css").read_text(encoding="utf-8")


def answer(text: str) -> Markup:
    """An answer, which may be a bare formula: `\\frac{1}{2}`."""
    if "$" not in text and re.search(r"[\\^_{]", text):
        return Markup(formula(text) or escape(text))
    return typeset(text)


def formula(latex: str, block: bool = False) -> str:
    """MathML; "" where the LaTeX cannot be read."""
    from latex2mathml.converter import convert

    if len(latex) > LONGEST_FORMULA:
        return ""
    try:
        tree = _clean(ElementTree.fromstring(convert(latex, display="block" if block else "inline")))
        return ElementTree.tostring(tree, encoding="unicode", short_empty_elements=False)
    except Exception:  # it is read by a library that knows the LaTeX of people, not of models
        return ""


def _clean(tree: ElementTree.Element) -> ElementTree.Element:
    name = tree.tag.removeprefix(_SPACE)
    kept = {key: value for key, value in tree.attrib.items() if key in ATTRIBUTES.split()}
    if (name, kept.get("notation")) == ("menclose", "box"):  # not every browser draws one
        name, kept = "mrow", {"class": "boxed"}
    made = ElementTree.Element(name if name in ELEMENTS.split() else "mrow", kept)
    made.text, made.tail = tree.text, tree.tail
    made.extend(_clean(child) for child in tree)
    return made
