"""What the JSON of the pool options says. Spec 7.2, 8.1."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final, final

from llm_datadist.checks import UINT32_MAX, check_json_object, describe
from llm_datadist.errors import invalid

DEFAULT_PAGE_SHIFT: Final = 16
_PAGE_SHIFTS: Final = range(10, 31)
_MAX_BLOCK_NBYTES: Final = 2 * 1024 * 1024


@final
@dataclass(frozen=True, slots=True)
class PoolConfig:
    """A pool of pages, as `mem_pool_cfg` and `host_mem_pool_cfg` describe it. Spec 8.1.

    Raises LLMException when `page_shift` is not in [10, 30], when there is no whole page, and when
    there are 2**32-1 pages or more.
    """

    memory_nbytes: int
    page_shift: int = DEFAULT_PAGE_SHIFT

    def __post_init__(self) -> None:
        if self.page_shift not in _PAGE_SHIFTS:
            raise invalid(f"page_shift must be in [10, 30], got {self.page_shift}")
        if not 0 < self.num_pages < UINT32_MAX:
            raise invalid(
                f"memory_size must be at least one page ({self.page_nbytes} bytes) and less than "
                f"2**32-1 pages, got {self.memory_nbytes}"
            )

    @classmethod
    def parse(cls, text: str, name: str = "mem_pool_cfg") -> PoolConfig:
        """The pool that the JSON object `text` describes; `name` is what messages call it.

        Raises LLMException when it describes none. Spec 8.1, decision D7.
        """
        fields = check_json_object(name, text)
        return cls(
            _unsigned(name, fields, "memory_size"),
            _unsigned(name, fields, "page_shift", DEFAULT_PAGE_SHIFT),
        )

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page."""
        return 1 << self.page_shift

    @property
    def num_pages(self) -> int:
        """Whole pages in the pool; what is left over is never used. Spec 8.1."""
        return self.memory_nbytes >> self.page_shift


@final
@dataclass(frozen=True, slots=True)
class SizeClass:
    """One class of a buffer pool. Spec 7.2.

    Raises LLMException unless `total_nbytes` is a multiple of 2 MiB and of the block and below
    2**32, `block_nbytes` is a power of two up to 2 MiB, and block <= max < total.
    """

    total_nbytes: int  #: bytes of the class
    block_nbytes: int  #: the unit in which they are handed out
    max_nbytes: int  #: the largest request that the class serves

    def __post_init__(self) -> None:
        total, block = self.total_nbytes, self.block_nbytes
        if not 0 < block <= _MAX_BLOCK_NBYTES or block & (block - 1):
            raise invalid(f"blk_size must be a power of two in [1, 2097152], got {block}")
        # a multiple of 2 MiB is one of every block size
        if total % _MAX_BLOCK_NBYTES or total > UINT32_MAX:
            raise invalid(f"total_size must be a multiple of 2097152 below 2**32, got {total}")
        if not block <= self.max_nbytes < total:
            raise invalid(
                f"max_buf_size must be at least blk_size ({block}) and less than "
                f"total_size ({total}), got {self.max_nbytes}"
            )

    @classmethod
    def _parse(cls, name: str, fields: object) -> SizeClass:
        if not isinstance(fields, dict):
            raise invalid(f"buf_cfg of {name} must hold objects, got {describe(fields)}")
        return cls(
            _unsigned(name, fields, "total_size"),
            _unsigned(name, fields, "blk_size"),
            _unsigned(name, fields, "max_buf_size"),
        )


@final
@dataclass(frozen=True, slots=True)
class BufPoolConfig:
    """A pool with size classes, as `buf_pool_cfg` describes it. Spec 7.2.

    Raises LLMException unless `max_nbytes` strictly increases from class to class.
    """

    classes: tuple[SizeClass, ...] = ()
    pool_nbytes: int | None = None  #: bytes of the whole pool; None when not given

    def __post_init__(self) -> None:
        sizes = [each.max_nbytes for each in self.classes]
        if any(larger <= smaller for smaller, larger in pairwise(sizes)):
            raise invalid(f"max_buf_size must increase from class to class, got {sizes}")

    @classmethod
    def parse(cls, text: str, name: str = "buf_pool_cfg") -> BufPoolConfig:
        """The pool that the JSON object `text` describes; `name` is what messages call it.

        Raises LLMException when it describes none. Spec 7.2.
        """
        fields = check_json_object(name, text)
        classes = fields.get("buf_cfg", [])
        if not isinstance(classes, list):
            raise invalid(f"buf_cfg of {name} must be an array, got {describe(classes)}")
        pool_nbytes = None
        if "buf_pool_size" in fields:
            pool_nbytes = _unsigned(name, fields, "buf_pool_size")
        return cls(tuple(SizeClass._parse(name, each) for each in classes), pool_nbytes)


def _unsigned(name: str, fields: dict[str, object], field: str, default: int | None = None) -> int:
    if field not in fields and default is None:
        raise invalid(f"{name} needs the field {field}")
    value = fields.get(field, default)
    if type(value) is not int or value < 0:
        raise invalid(f"{field} of {name} must be an unsigned integer, got {describe(value)}")
    return value
