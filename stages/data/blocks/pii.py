"""Personal data masked: e-mail and IP addresses, telephone, card and account numbers, keys. `<EMAIL>` and so on.

A card number must pass Luhn's check, an account number ISO 13616's, an IP address lie outside private networks: version
numbers and examples stay. What is masked in code is only keys and e-mail addresses.
"""

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

from stages.data.document import Document
from stages.stage import option

# Every repetition is bounded, or tried once from each place: a hostile page must not cost the square of its length.
EMAIL = re.compile(r"\b[A-Za-z0-9._%+-]{1,64}+@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,8}\.[A-Za-z]{2,63}\b")
KEY = re.compile(r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|sk-[A-Za-z0-9_-]{32,}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[\w-]{35})\b"
                 r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----(?:(?!-----).){0,20000}-----END [A-Z ]{0,40}PRIVATE KEY-----", re.DOTALL)
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b")
CARD = re.compile(r"(?<![\d-])\d(?:[ -]?\d){12,18}(?![\d-])")
IP = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")
PHONE = re.compile(r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]\d{2,4}){2,4}"
                   r"|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})(?![\w-])")  # fmt: skip


PRIVATE = True


@dataclass
class Config:
    kinds: list[str] = option(["email", "key", "iban", "card", "ip", "phone"], "what is masked",
                              choices=("email", "key", "iban", "card", "ip", "phone"))  # fmt: skip


def clean(document: Document, config: Config) -> str:
    """Masks in place and removes nothing."""
    text = document.text
    for kind in config.kinds:
        trigger, pattern, holds = KINDS[kind]
        if (document.domain != "code" or kind in ("email", "key")) and trigger(text):
            mask = f"<{kind.upper()}>"
            text = pattern.sub(lambda found, mask=mask, holds=holds: mask if holds(found[0]) else found[0], text)
    document.text = text
    return ""


def _luhn(number: str) -> bool:
    digits = [int(digit) for digit in number if digit.isdigit()][::-1]
    return sum(digits[::2]) % 10 == -sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2]) % 10 and len(set(digits)) > 1


def _account(number: str) -> bool:
    number = number.replace(" ", "")
    return 15 <= len(number) <= 34 and int("".join(str(int(one, 36)) for one in number[4:] + number[:4])) % 97 == 1


def _public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global and not address.endswith(".0.0")
    except ValueError:
        return False


_digit = re.compile(r"\d").search
KINDS: dict[str, tuple[Callable, re.Pattern, Callable[[str], bool]]] = {
    "email": (lambda text: "@" in text, EMAIL, lambda _: True),
    "key": (re.compile("AKIA|gh[pousr]_|sk-|xox|AIza|PRIVATE KEY").search, KEY, lambda _: True),
    "iban": (_digit, IBAN, _account), "card": (_digit, CARD, _luhn), "ip": (_digit, IP, _public),
    "phone": (_digit, PHONE, lambda _: True),
}  # fmt: skip
