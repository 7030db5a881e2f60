"""What a section of the configuration is made of. Imports neither torch nor transformers."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """A field that only changes a default has its base's description."""
        bases = [base.model_fields for base in cls.__mro__[1:] if issubclass(base, Section)]
        for name, field in cls.model_fields.items():
            said = (fields[name].description for fields in bases if name in fields)
            field.description = field.description or next(filter(None, said), None)
