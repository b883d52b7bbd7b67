"""Who may read a lake: its owner alone, or a group as well (HB_LAKE_GROUP).

The lake's root folder says it by its own mode, for whoever writes into it: with the setgid bit and
rights of its group (2750, or 2770 where several users write) folders are made like it, and files
that its group reads (0640). Otherwise all that is made is for its owner alone (0700, 0600).
"""

from __future__ import annotations

import grp
import os
import stat
from pathlib import Path

from hb_assets.core import private_files
from hb_assets.core.errors import SettingsError
from hb_assets.core.settings import Settings

_GROUP_READS, _GROUP_WRITES = 0o2750, 0o2770
_SHARED = 0o2050
_OTHERS = 0o007
_GROUP = 0o070


def of_folders(root: Path) -> int:
    """Mode of new folders in a lake."""
    mode = stat.S_IMODE(root.stat().st_mode)
    if mode & _SHARED != _SHARED:
        return private_files.FOLDER
    return _GROUP_WRITES if mode & stat.S_IWGRP else _GROUP_READS


def of_files(root: Path) -> int:
    """Mode of new files in a lake."""
    return private_files.FILE if of_folders(root) == private_files.FOLDER else 0o640


def of_locks(root: Path) -> int:
    """Mode of lock files in a lake: whoever may write to it has to be able to hold one."""
    return 0o660 if of_folders(root) == _GROUP_WRITES else of_files(root)


def share(root: Path, settings: Settings) -> None:
    """Give the empty root folder of a new lake to HB_LAKE_GROUP, where there is one.

    And let that group pass through HB_HOME, where the lake lies in it: what else is there has modes
    of its own.

    Raises:
        SettingsError: it can't be given to that group.
    """
    if settings.lake_group is None:
        return
    group = grp.getgrnam(settings.lake_group).gr_gid
    home = settings.home_dir
    between = [one for one in root.parents if one == home or one.is_relative_to(home)]
    try:
        _give(root, group, _GROUP_WRITES if settings.lake_group_writes else _GROUP_READS)
        for folder in between:
            _give(folder, group, stat.S_IMODE(folder.stat().st_mode) | stat.S_IXGRP)
    except PermissionError:
        raise SettingsError(
            f"HB_LAKE_GROUP: the lake {root} can't be given to the group {settings.lake_group}: "
            "run hb as a member of that group, and as the owner of the folder"
        ) from None


def _give(folder: Path, group: int, mode: int) -> None:
    found = folder.stat()
    if found.st_gid != group:
        os.chown(folder, -1, group)
    if stat.S_IMODE(folder.stat().st_mode) != mode:
        folder.chmod(mode)


def warnings(settings: Settings) -> list[str]:
    """One line for each path whose mode is too open, or closed to HB_LAKE_GROUP; how to mend it."""
    home, root = settings.home_dir, settings.lake_dir
    found = []
    home_mode, root_mode = _mode(home), _mode(root)
    group = settings.lake_group
    if home_mode is not None and home_mode & (_OTHERS | (0o060 if group else _GROUP)):
        found.append(
            f"HB_HOME {home} is open to other users of this machine (mode {home_mode:04o}): "
            f"`chmod go-rwx {home}` closes it"
        )
    if root_mode is None:
        return found
    shared = of_folders(root) != private_files.FOLDER
    sharing = (
        f"`chgrp -R {group or 'GROUP'} {root} && chmod -R u=rwX,g=rX,o= {root} && "
        f"find {root} -type d -exec chmod g+s {{}} +` shares it with a group (HB_LAKE_GROUP)"
    )
    if root_mode & _OTHERS or (root_mode & _GROUP and not shared):
        found.append(
            f"the lake {root} is open to other users of this machine (mode {root_mode:04o}): "
            f"`chmod -R go-rwx {root}` closes it, {sharing}"
        )
    elif group is not None and not (shared and root.stat().st_gid == grp.getgrnam(group).gr_gid):
        found.append(f"the lake {root} isn't shared with HB_LAKE_GROUP: {sharing}")
    return found


def _mode(folder: Path) -> int | None:
    try:
        return stat.S_IMODE(folder.stat().st_mode)
    except OSError:
        return None
