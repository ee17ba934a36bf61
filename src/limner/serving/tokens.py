"""Tokens: what a client shows, and what of it is stored."""

from __future__ import annotations

import hashlib
import secrets

PREFIX = "limner-"  # by which scanners of leaked secrets may know one


def new_token() -> str:
    """A token of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(token: str) -> str:
    """What is stored of a token: its SHA-256, which needs no salt since the token is random."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
