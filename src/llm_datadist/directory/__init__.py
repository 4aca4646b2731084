"""Directories: who is in a fleet, and where.

A member announces a `Record` of itself, and watches for those of others. Two directories are here,
with the standard library alone: a folder that all members see, and etcd. Others come by an entry
point. What becomes of it: `LLMDataDist.follow`, and the guide "A fleet".
"""

from llm_datadist.directory.base import Announcement as Announcement
from llm_datadist.directory.base import Change as Change
from llm_datadist.directory.base import Changes as Changes
from llm_datadist.directory.base import Directory as Directory
from llm_datadist.directory.base import DirectoryError as DirectoryError
from llm_datadist.directory.base import Superseded as Superseded
from llm_datadist.directory.base import Watch as Watch
from llm_datadist.directory.etcd import EtcdDirectory as EtcdDirectory
from llm_datadist.directory.folder import FolderDirectory as FolderDirectory
from llm_datadist.directory.opening import open_directory as open_directory
from llm_datadist.directory.record import Record as Record
