"""A directory by one word, as an environment variable or a configuration has it.

Other packages add kinds by an entry point, whose object is called with the whole word:

    [project.entry-points."llm_datadist.directories"]
    kubernetes = "my_package:KubernetesDirectory"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from llm_datadist.directory.etcd_word import etcd_of
from llm_datadist.directory.folder import FolderDirectory
from llm_datadist.errors import invalid

if TYPE_CHECKING:
    from llm_datadist.directory.base import Directory

GROUP: Final = "llm_datadist.directories"


def open_directory(url: str) -> Directory:
    """`folder:/shared/fleet`, `etcd://host:port/prefix`, or what another package knows.

    `etcds://` is etcd by TLS. Behind a `?` both take `user` and `password_file`, and the latter
    `ca`, and `certificate` and `key` of a client; all but the user are paths of files.

    Raises LLMException (LLM_PARAM_INVALID) for a kind that nobody knows, for settings and files
    that cannot be; what another package raises.
    """
    kind, _, rest = url.partition(":")
    if kind == "folder" and rest:
        return FolderDirectory(rest)
    if kind in ("etcd", "etcds") and rest.startswith("//"):
        return etcd_of(url)
    from importlib.metadata import entry_points  # slow to import

    for point in entry_points(group=GROUP):
        if point.name == kind:
            directory: Directory = point.load()(url)
            return directory
    raise invalid(
        f"no directory is called {url!r}: it is folder:/path, etcd://host:port/prefix, or of a "
        f"package with an entry point in {GROUP}"
    )
