"""What goes wrong over HTTP, as an answer: a status, a code for programs, a sentence for people."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import ValidationError

from store.errors import BadMoment, HistoryDropped, NoAnswer, ReconcilerError, UnknownProcess
from store.logs import get_logger
from store.refusals import Unavailable

log = get_logger("reconciler.web")


class Failure(msgspec.Struct, omit_defaults=True):
    """The body of every answer that is not a success.

    Attributes:
        error: a word for programs.
        message: a sentence for people: what is wrong, and what to do.
        nearest: what may have been meant.
    """

    error: str
    message: str
    nearest: tuple[str, ...] = ()


class ApiError(Exception):
    """An answer that is not a success; raised by whoever notices."""

    def __init__(
        self,
        status: int,
        error: str,
        message: str,
        *,
        nearest: tuple[str, ...] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.failure = Failure(error, message, nearest)
        self.headers = dict(headers or {})


def bad_request(error: ValidationError) -> ApiError:
    """What pydantic found wrong, as one sentence that names the place."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"]) or "the body"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such member here"
    return ApiError(400, "bad_request", f"{name}: {message}")


def answer(error: ApiError) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(error.failure),
        status=error.status,
        headers=error.headers,
        content_type="application/json",
    )


@web.middleware
async def as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure leaves as JSON; a fault of ours is logged and does not tell its inside."""
    try:
        return await handler(request)
    except ApiError as error:
        return answer(error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return answer(_of_http(request, error))
    except BadMoment as error:
        return answer(ApiError(400, "bad_moment", str(error)))
    except HistoryDropped as error:
        return answer(ApiError(404, "history_dropped", str(error)))
    except NoAnswer as error:
        return answer(ApiError(503, "no_answer", str(error), headers={"Retry-After": "10"}))
    except UnknownProcess as error:
        return answer(ApiError(404, "unknown_process", str(error)))
    except Unavailable as error:
        message = f"Redis is away ({error}); try again"
        return answer(ApiError(503, "redis_away", message, headers={"Retry-After": "2"}))
    except ReconcilerError as error:
        return answer(ApiError(503, "not_done", str(error), headers={"Retry-After": "5"}))
    except Exception:
        log.exception("request failed", path=request.path)
        return answer(ApiError(500, "fault", "a fault of the worker; its log tells more"))


def _of_http(request: web.Request, error: web.HTTPException) -> ApiError:
    if error.status == 404:
        message = f"there is nothing at {request.path}; /api/openapi.json lists what there is"
        return ApiError(404, "no_such_path", message)
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"{request.path} takes {allowed}"
        return ApiError(405, "method_not_allowed", message, headers={"Allow": allowed})
    if error.status == 413:
        return ApiError(413, "too_large", "the body is larger than any request needs")
    return ApiError(error.status, "bad_request", error.reason)
