"""The key ceremony: who may sign what, changed only by a new root that old and new root keys sign.

A change goes into a draft of the next root (`ceremony/root.json`), where several may gather. Root keys
that are here sign at once; for the others the draft travels. When enough have signed, it is released, and
what the server signs by itself is signed anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from tuf.api.metadata import Metadata, Root

from pos_gateway.distribution import LIMIT_KEYS_FIELD, LimitKeys
from pos_gateway.errors import Conflict, InvalidInput, NotFound, Unavailable
from pos_gateway.ledger.config import MetadataLives
from pos_gateway.ledger.repository import Repository
from pos_gateway.ledger.signing import (
    KeyChest,
    PublicKey,
    Role,
    SigningKey,
    new_signing_key,
    read_metadata,
    replace_file,
    sign_metadata,
    tuf_key,
)

_DRAFT: Final = "root.json"


@dataclass(frozen=True, slots=True)
class KeyState:
    role: Role
    id: str
    here: bool
    """Is the private half on this machine?"""


@dataclass(frozen=True, slots=True)
class RoleState:
    role: Role
    threshold: int
    keys: tuple[KeyState, ...]


@dataclass(frozen=True, slots=True)
class CeremonyState:
    """The root in force, and what a draft of the next still lacks: signatures by the keys of the old
    root, and by its own."""

    version: int
    expires: datetime
    roles: tuple[RoleState, ...]
    draft: Path | None
    draft_lacks: tuple[int, int]


def first_root(
    keys: Mapping[Role, Sequence[SigningKey]], thresholds: Mapping[Role, int], expires: datetime
) -> Metadata[Root]:
    """Root version 1, signed.

    Raises:
        InvalidInput: a threshold that its keys cannot reach.
    """
    root = Root(version=1, expires=expires, consistent_snapshot=True)
    limits = {key.id: key.public.key for key in keys[Role.LIMITS]}
    root.unrecognized_fields[LIMIT_KEYS_FIELD] = LimitKeys(limits, 1).to_field()
    for role in Role:
        if role.in_tuf:
            for key in keys[role]:
                root.add_key(tuf_key(key.public.key), role.value)
        set_threshold(root, role, thresholds.get(role, 1))
    metadata = Metadata(root)
    sign_metadata(metadata, keys[Role.ROOT])
    return metadata


def add_key(root: Root, key: PublicKey) -> None:
    """
    Raises:
        Conflict: it has that role already, or another: one key, one role.
    """
    if any(key.id in ids for ids in _key_ids(root).values()):
        raise Conflict(f"key {key.id} is in the root already")
    if key.role is Role.LIMITS:
        limits = LimitKeys.of(root)
        _set_limits(root, LimitKeys({**limits.keys, key.id: key.key}, limits.threshold))
    else:
        root.add_key(tuf_key(key.key), key.role.value)


def remove_key(root: Root, key_id: str) -> Role:
    """
    Raises:
        NotFound: no role has it.
        InvalidInput: the role's threshold could not be reached any more.
    """
    role = next((role for role, ids in _key_ids(root).items() if key_id in ids), None)
    if role is None:
        raise NotFound(f"no role has a key {key_id}", advice="`pos-gateway ledger keys show`")
    ids = _key_ids(root)[role]
    if len(ids) - 1 < threshold_of(root, role):
        raise InvalidInput(
            f"{role.value} needs {threshold_of(root, role)} keys and would have {len(ids) - 1}",
            where="threshold",
            advice="add a new key first, or lower the threshold",
        )
    if role is Role.LIMITS:
        limits = LimitKeys.of(root)
        _set_limits(root, LimitKeys({i: k for i, k in limits.keys.items() if i != key_id}, limits.threshold))
    else:
        root.revoke_key(key_id, role.value)
    return role


def set_threshold(root: Root, role: Role, threshold: int) -> None:
    """
    Raises:
        InvalidInput: not 1 to the number of the role's keys.
    """
    count = len(_key_ids(root)[role])
    if not 1 <= threshold <= count:
        raise InvalidInput(
            f"must be 1 to {count}, the number of its keys", where=f"threshold of {role.value}"
        )
    if role is Role.LIMITS:
        _set_limits(root, LimitKeys(LimitKeys.of(root).keys, threshold))
    else:
        root.roles[role.value].threshold = threshold


def threshold_of(root: Root, role: Role) -> int:
    if role is Role.LIMITS:
        return LimitKeys.of(root).threshold
    threshold: int = root.roles[role.value].threshold
    return threshold


class Ceremony:
    """The keys of one ledger's repository. Changes hold the repository exclusively."""

    def __init__(
        self,
        repository: Repository,
        keys: Path,
        drafts: Path,
        now: Callable[[], datetime],
        lives: Callable[[], MetadataLives],
    ) -> None:
        self._repository = repository
        self._keys = keys
        self._draft = drafts / _DRAFT
        self._now = now
        self._lives = lives

    @property
    def chest(self) -> KeyChest:
        """The signing keys that are here now."""
        return KeyChest.open(self._keys)

    def state(self) -> CeremonyState:
        root, chest = self._repository.root(), self.chest
        draft = self._read_draft(root)
        return CeremonyState(
            version=root.signed.version,
            expires=root.signed.expires,
            roles=tuple(
                RoleState(
                    role,
                    threshold_of(root.signed, role),
                    tuple(KeyState(role, i, i in chest.keys) for i in sorted(ids)),
                )
                for role, ids in _key_ids(root.signed).items()
            ),
            draft=self._draft if draft else None,
            draft_lacks=_lacks(root, draft) if draft else (0, 0),
        )

    def create(self, role: Role, folder: Path | None = None) -> tuple[SigningKey, Path]:
        """A new key, here or in another folder. It counts for nothing before a root names it."""
        key = new_signing_key(role)
        return key, key.write(folder or self._keys)

    def rotate(self, new: PublicKey, old_id: str | None) -> CeremonyState:
        """A new key for its role; with `old_id` in that one's place.

        Raises:
            Conflict: the root has the new key already, or the old one has another role.
            NotFound, InvalidInput: as `remove_key`.
        """

        def change(root: Root) -> None:
            add_key(root, new)
            if old_id is not None and remove_key(root, old_id) is not new.role:
                raise Conflict(f"key {old_id} is not a {new.role.value} key")

        return self.change(change)

    def change(self, change: Callable[[Root], object]) -> CeremonyState:
        """Add a change to the draft of the next root, which then needs all its signatures anew, and
        release it if the root keys that are here suffice. A change that does nothing renews the root.

        Raises:
            Whatever `change` raises; nothing was changed then.
        """
        with self._repository.exclusive():
            root = self._repository.root()
            # Deep: python-tuf's own copies by way of dictionaries share their lists of key ids.
            draft = self._read_draft(root) or Metadata(copy.deepcopy(root.signed))
            change(draft.signed)
            draft.signed.version = root.signed.version + 1
            draft.signed.expires = self._now() + timedelta(seconds=self._lives().root_s)
            draft.signatures.clear()
            self._draft.parent.mkdir(exist_ok=True)
            self._sign_draft(draft)
            if _lacks(root, draft) == (0, 0):
                self._release(draft)
        return self.state()

    def release(self) -> CeremonyState:
        """Release the draft once enough root keys have signed it.

        Raises:
            NotFound: there is no draft.
            Unavailable: signatures are missing, or the server lacks the keys that the new root names.
        """
        with self._repository.exclusive():
            root = self._repository.root()
            draft = self._read_draft(root)
            if draft is None:
                raise NotFound("there is no draft of a new root")
            self._sign_draft(draft)
            old, own = _lacks(root, draft)
            if old or own:
                raise Unavailable(
                    f"the new root lacks {old} signatures by today's root keys and {own} by its own",
                    advice=f"pos-gateway ledger keys sign {self._draft} --key …, then release again",
                )
            self._release(draft)
        return self.state()

    def discard(self) -> None:
        """Forget the draft."""
        self._draft.unlink(missing_ok=True)

    def renew(self) -> None:
        """See `Repository.renew`."""
        with self._repository.exclusive():
            self._repository.renew(self.chest, self._now(), self._lives())

    def _sign_draft(self, draft: Metadata[Root]) -> None:
        sign_metadata(draft, self.chest.of(Role.ROOT))
        replace_file(self._draft, draft.to_bytes())

    def _release(self, draft: Metadata[Root]) -> None:
        chest = self.chest
        for role in (Role.SNAPSHOT, Role.TIMESTAMP):
            present = len(_key_ids(draft.signed)[role] & chest.keys.keys())
            if present < threshold_of(draft.signed, role):
                raise Unavailable(
                    f"the new root wants {threshold_of(draft.signed, role)} {role.value} keys, "
                    f"{present} of them are on this server",
                    advice=f"put the private keys into {self._keys}",
                )
        self._repository.write_root(draft)
        self._draft.unlink()
        self._repository.renew(chest, self._now(), self._lives())

    def _read_draft(self, root: Metadata[Root]) -> Metadata[Root] | None:
        if not self._draft.is_file():
            return None
        draft = read_metadata(self._draft)
        return draft if draft.signed.version == root.signed.version + 1 else None


def _lacks(root: Metadata[Root], draft: Metadata[Root]) -> tuple[int, int]:
    old, own = (
        signer.signed.get_verification_result("root", draft.signed_bytes, draft.signatures).missing
        for signer in (root, draft)
    )
    return old, own


def _key_ids(root: Root) -> dict[Role, set[str]]:
    ids = {role: set(root.roles[role.value].keyids) for role in Role if role.in_tuf}
    return ids | {Role.LIMITS: set(LimitKeys.of(root).keys)}


def _set_limits(root: Root, limits: LimitKeys) -> None:
    root.unrecognized_fields[LIMIT_KEYS_FIELD] = limits.to_field()
