"""Requests to the Hub that wait where it asks them to, and say what to do where it refuses them."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError


logger = logging.getLogger(__name__)

Result = TypeVar("Result")
LOG_IN = (
    "log in with `hf auth login`, or set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens)"
)
LONGEST_PAUSE = 60.0  # seconds


def request_patiently(request: Callable[[], Result], minutes: float = 10.0) -> Result:
    """What `request` returns; it is made again while the Hub is busy (429) or out of order (5xx).

    The pauses are those that the Hub asks for by `Retry-After`, or else 1, 2, 4, … up to 60 seconds.

    Args:
        request: of `huggingface_hub`; may be made several times.
        minutes: no pause begins that would end later than this after the first request.

    Raises:
        PermissionError: there is no token, or one that may not do this.
        HfHubHTTPError: any other refusal, or the last one when the time is over; a RuntimeError of huggingface_hub
            where it was one of the files that it uploads before the commit.
    """
    end, pause = time.monotonic() + 60 * minutes, 1.0
    while True:
        try:
            return request()
        except LocalTokenNotFoundError as error:
            raise PermissionError(f"the Hub wants a token, and there is none: {LOG_IN}.") from error
        except (HfHubHTTPError, RuntimeError) as error:
            refusal = error if isinstance(error, HfHubHTTPError) else error.__cause__  # of an upload of a large file
            if not isinstance(refusal, HfHubHTTPError):
                raise
            status = refusal.response.status_code
            if status in (401, 403):
                raise PermissionError(f"the Hub refuses the token ({refusal}): {LOG_IN}.") from error
            wait = _asked_for(refusal) or pause
            if status != 429 and status < 500 or time.monotonic() + wait > end:
                raise
            logger.warning("The Hub answers with %d: once more in %.0f seconds.", status, wait)
        time.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE)


def _asked_for(error: HfHubHTTPError) -> float | None:
    """The seconds of the answer's `Retry-After`, if it has one in seconds."""
    text = error.response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None


__all__ = ["request_patiently"]
