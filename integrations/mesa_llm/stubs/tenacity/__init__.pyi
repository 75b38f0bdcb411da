from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])

def retry(*, stop: object, reraise: bool) -> Callable[[_F], _F]: ...
def stop_after_attempt(number: int) -> object: ...
