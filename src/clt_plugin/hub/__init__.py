"""Where crosscoders lie: local folders, and repositories on the Hugging Face Hub. Knows nothing of formats."""

from clt_plugin.hub._errors import explained
from clt_plugin.hub.catalogue import CATALOGUE, Catalogue, Entry
from clt_plugin.hub.folder import Folder
from clt_plugin.hub.places import open_folder, open_folders, pinned
from clt_plugin.hub.reference import Reference
from clt_plugin.hub.remote import RemoteFile, RemoteFolder, fetch, read_headers

__all__ = [
    "CATALOGUE",
    "Catalogue",
    "Entry",
    "Folder",
    "Reference",
    "RemoteFile",
    "RemoteFolder",
    "explained",
    "fetch",
    "open_folder",
    "open_folders",
    "pinned",
    "read_headers",
]
