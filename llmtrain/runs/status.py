"""`status.json`: how far a run is, as its folder says it to people and programs."""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError

from llmtrain.errors import DataError
from llmtrain.files import read_json, unsealed

STATUS = "status.json"

Status = Literal["running", "restarting", "done", "preempted", "failed", "stalled"]
Number = Annotated[int, Field(ge=0, le=10**18)]
Pid = Annotated[int, Field(gt=0, lt=2**31)]

NEXT_ACTIONS: dict[Status, str] = {
    "running": "wait",
    "restarting": "wait: all ranks are started again from the newest valid checkpoint",
    "done": "nothing: more than {step} steps go on (train.steps, train.tokens or train.epochs)",
    "preempted": "start the same command again: it continues",
    "failed": "mend the cause, then start the same command again: it continues from the newest valid checkpoint",
    "stalled": "mend the cause first: started again as it is, it would fail at the same place",
}
"""The next thing to do about a run, by its status; `step` is the last one that it has made."""

STOPPED_EARLY = "nothing: it has stopped early; a larger evaluate.stop_after, or null, goes on"


def next_action(status: Status, step: int, total_steps: int) -> str:
    """The next thing to do about a run; one that is done before its last step has stopped early."""
    if status == "done" and step < total_steps:
        return STOPPED_EARLY
    return NEXT_ACTIONS[status].format(step=step)


@dataclass(frozen=True)
class RunStatus:
    """The content of `status.json`. `updated` is an ISO time in UTC.

    `attempt` counts the starts by one launcher, from 0; `cause` is why the run, or its last attempt, has failed;
    `verdict` is the last judgement of a step that was not as it should be.
    """

    status: Status
    step: Number
    total_steps: Number
    message: str
    pid: Pid
    host: str
    updated: str
    attempt: Number = 0
    cause: str = ""
    next_action: str = ""
    verdict: str = ""


_FIELDS = TypeAdapter(RunStatus)


def read_status(path: Path) -> RunStatus | None:
    """The run folder's `status.json`; None where there is none. Raises DataError for a damaged one."""
    file = Path(path) / STATUS
    try:
        found = read_json(file)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a JSON {type(found).__name__}, not an object")
        content = unsealed(found)
        if missing := [item.name for item in fields(RunStatus) if item.default is MISSING and item.name not in content]:
            raise ValueError(f"{', '.join(missing)}: missing")
        status = RunStatus(**content)
        if status.status not in (allowed := get_args(Status)):
            raise ValueError(f"status = {status.status}, allowed are {', '.join(allowed)}")
        _FIELDS.validate_json(json.dumps(asdict(status)), strict=True)
        if datetime.fromisoformat(status.updated).utcoffset() is None:
            raise ValueError("updated: has no zone")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}. Remove it: a run writes another one.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, value = ".".join(map(str, first["loc"])), repr(first["input"])[:60]
        raise _no_status(file, f"{key} = {value}: {first['msg']}") from error
    except (ValueError, TypeError) as error:
        raise _no_status(file, str(error)) from error
    return status


def _no_status(file: Path, fault: str) -> DataError:
    return DataError(f"{file}: is not a status that llmtrain wrote: {fault}. Remove it: a run writes another one.")
