"""A directory by one word, as an environment variable or a configuration has it.

Other packages add kinds by an entry point, whose object is called with the whole word:

    [project.entry-points."llm_datadist.directories"]
    kubernetes = "my_package:KubernetesDirectory"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from llm_datadist.directory.etcd import EtcdDirectory
from llm_datadist.directory.folder import FolderDirectory
from llm_datadist.errors import invalid

if TYPE_CHECKING:
    from llm_datadist.directory.base import Directory

GROUP: Final = "llm_datadist.directories"


def open_directory(url: str) -> Directory:
    """`folder:/shared/fleet`, `etcd://host:port/prefix`, or what another package knows.

    Raises LLMException (LLM_PARAM_INVALID) for a kind that nobody knows; what that package raises.
    """
    kind, _, rest = url.partition(":")
    if kind == "folder" and rest:
        return FolderDirectory(rest)
    if kind == "etcd" and rest.startswith("//"):
        parts = urlsplit(url)
        return EtcdDirectory(f"http://{parts.netloc}", parts.path or "/llm-datadist")
    from importlib.metadata import entry_points  # slow to import

    for point in entry_points(group=GROUP):
        if point.name == kind:
            directory: Directory = point.load()(url)
            return directory
    raise invalid(
        f"no directory is called {url!r}: it is folder:/path, etcd://host:port/prefix, or of a "
        f"package with an entry point in {GROUP}"
    )
