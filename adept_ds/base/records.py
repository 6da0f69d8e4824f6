"""Records that are read back from disk: read strictly, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from adept_ds.base.errors import DamagedError
from adept_ds.base.files import write_json

if TYPE_CHECKING:
    from typing import Self


class Record(BaseModel):
    """Base of every record: no unknown keys, no conversion of types, no NaN, no change once it is made.

    A subclass that stands in a file says with `remedy` what to do where that file cannot be used.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_by_name=True, validate_by_alias=True
    )

    @classmethod
    def remedy(cls) -> str:
        return "make it again"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            DamagedError: it is not there, or not such a record; the message names the place in it and the remedy.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise DamagedError(f"'{path}' cannot be read ({error.strerror})", cls.remedy()) from None
        except ValidationError as error:
            raise DamagedError(f"'{path}' is damaged ({first_mistake(error)})", cls.remedy()) from None

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return self.model_dump(mode="json", by_alias=True)


def first_mistake(error: ValidationError) -> str:
    """What is wrong with a record, in a few words on one line."""
    mistake = error.errors()[0]
    place = ".".join(map(str, mistake["loc"])) or "the file"
    message = mistake["msg"].removeprefix("Value error, ")[:200].replace("\n", " ")
    return f"{place[:100]!r}: {message}"
