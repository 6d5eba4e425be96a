"""What the hub's errors mean, in one sentence, without the client's two hundred lines of traceback."""

from collections.abc import Generator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub import errors as hub

_HTTPError: type[Exception] = hub.HfHubHTTPError.__bases__[0]  # httpx's or httpx2's, as huggingface_hub has it
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def explained(what: str, *, cached: bool = True) -> Generator[None]:
    """Turn errors of huggingface_hub about `what` into errors a caller can act on; `cached` where its cache was tried, too.

    Raises:
        FileNotFoundError: there is no such thing on the hub, or neither the hub nor the cache can give it.
        ValueError: the hub refuses, for want of a login or of rights, or answers with an error.
    """
    try:
        yield
    except hub.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{what}: the repository has no such revision ({_short(error)})") from None
    except hub.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{what}: the hub at {constants.ENDPOINT} has no such repository, or keeps it private; check the spelling, or "
            f"{LOG_IN} ({_short(error)})"
        ) from None
    except hub.LocalEntryNotFoundError as error:
        raise FileNotFoundError(_unreachable(what, error.__cause__ or error, cached)) from None
    except hub.EntryNotFoundError as error:
        raise FileNotFoundError(f"{what}: the repository has no such file ({_short(error)})") from None
    except hub.HfHubHTTPError as error:
        raise ValueError(_refused(what, error)) from None
    except (_HTTPError, hub.OfflineModeIsEnabled) as error:
        raise FileNotFoundError(_unreachable(what, error, cached)) from None
    except ValueError as error:
        cause = error.__cause__  # a forced download has no cache to fall back on
        if isinstance(cause, hub.HfHubHTTPError):
            raise ValueError(_refused(what, cause)) from None
        if isinstance(cause, (_HTTPError, hub.OfflineModeIsEnabled)):
            raise FileNotFoundError(_unreachable(what, cause, cached)) from None
        raise


def _unreachable(what: str, error: BaseException, cached: bool) -> str:
    state = "cannot be reached and the cache does not have it" if cached else "cannot be reached"
    return f"{what}: the hub at {constants.ENDPOINT} {state}; check the connection and HF_HUB_OFFLINE ({_short(error)})"


def _refused(what: str, error: hub.HfHubHTTPError) -> str:
    status = error.response.status_code
    remedy = {
        401: LOG_IN,
        403: f"the login may not do this: check who owns the repository and the rights of the token, or {LOG_IN}",
        412: "somebody else changed the repository meanwhile: do it again",
    }
    return f"{what}: the hub at {constants.ENDPOINT} answers {status}; {remedy.get(status, 'try again later')} ({_short(error)})"


def _short(error: BaseException) -> str:
    """The client's own words, in one line."""
    return " ".join(str(error).split())[:200]
