"""Where crosscoders lie: local folders, and repositories on the Hugging Face Hub. Knows nothing of formats."""

from clt_plugin.hub.catalogue import CATALOGUE, Catalogue, Entry
from clt_plugin.hub.folder import Folder
from clt_plugin.hub.places import open_folder, open_folders
from clt_plugin.hub.reference import Reference
from clt_plugin.hub.remote import RemoteFile, RemoteFolder, explained, fetch, read_headers

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
    "read_headers",
]
