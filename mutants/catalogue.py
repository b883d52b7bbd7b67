"""The mutants: each one line changed so that heartbeats could get lost, doubled or wrong.

Plain data. A line that goes for good is replaced by one of the code that then does its job; the
list never gets shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["ingest", "consolidation and pruning", "reads", "ledger"]
GROUPS: tuple[Group, ...] = ("ingest", "consolidation and pruning", "reads", "ledger")


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change that a test has to notice.

    Attributes:
        name: what would be wrong, in a few words.
        group: the part of the system.
        file: from the project's root.
        line: text that is exactly once in the file: a line, or as many as make it the only one.
        instead: what takes its place.
        test: pytest's id of the test that must fail.
    """

    name: str
    group: Group
    file: str
    line: str
    instead: str
    test: str


_TESTS = "hb_assets_tests"
_LAKE = "hb_assets/lake"

MUTANTS: tuple[Mutant, ...] = (
    # -- ingest: spool, buffer, drain, and who may send
    Mutant(
        "the spool is not synced",
        "ingest",
        "hb_assets/gateway/spool/queue.py",
        'db.execute("PRAGMA synchronous = FULL")',
        'db.execute("PRAGMA synchronous = OFF")',
        f"{_TESTS}/gateway/spool/test_queue.py::test_what_is_stored_is_on_the_disk_before_it_is_answered",
    ),
    Mutant(
        "the spool takes more than its bound",
        "ingest",
        "hb_assets/gateway/spool/queue.py",
        "if held + size > self._most_bytes:",
        "if held > self._most_bytes:",
        f"{_TESTS}/gateway/spool/test_queue.py::test_a_full_spool_refuses_what_does_not_fit",
    ),
    Mutant(
        "deleted heartbeats stay in the spool's pages",
        "ingest",
        "hb_assets/gateway/spool/queue.py",
        'db.execute("PRAGMA secure_delete = ON")',
        'db.execute("PRAGMA secure_delete = OFF")',
        f"{_TESTS}/gateway/spool/test_queue.py::"
        "test_what_is_deleted_is_overwritten_and_its_room_given_back",
    ),
    Mutant(
        "a torn record of the spool is served",
        "ingest",
        "hb_assets/gateway/spool/database.py",
        "if checksum != _checksum(shard, n, text):",
        "if checksum is None:",
        f"{_TESTS}/gateway/spool/test_queue.py::test_a_torn_record_is_set_aside_and_not_served",
    ),
    Mutant(
        "a shard that Redis refuses is replayed all the same",
        "ingest",
        "hb_assets/gateway/spool/database.py",
        'f" AND shard NOT IN ({shards}) ORDER BY id"',
        'f" AND ({len(shards)} >= 0) ORDER BY id"',
        f"{_TESTS}/gateway/spool/test_queue.py::test_a_shard_can_be_skipped",
    ),
    Mutant(
        "one byte of a key's digest is compared",
        "ingest",
        "hb_assets/gateway/auth/access.py",
        "compare_digest(sha256(token).digest(), known.digest)",
        "compare_digest(sha256(token).digest()[:1], known.digest[:1])",
        f"{_TESTS}/gateway/auth/test_access.py::test_every_byte_of_a_digest_counts",
    ),
    Mutant(
        "an expired key still counts",
        "ingest",
        "hb_assets/gateway/auth/access.py",
        "if known.expires <= time.time():",
        "if known.expires <= 0:",
        f"{_TESTS}/gateway/auth/test_access.py::test_an_expired_key_says_so",
    ),
    Mutant(
        "a call passes the buffer's bound",
        "ingest",
        "hb_assets/buffer/scripts/append.lua",
        "if buffered + heartbeats > most or",
        "if buffered > most or",
        f"{_TESTS}/buffer/test_producer.py::"
        "test_the_bound_holds_and_a_call_is_stored_whole_or_not_at_all[valkey]",
    ),
    Mutant(
        "a ledger that was set back goes unnoticed",
        "ingest",
        "hb_assets/buffer/scripts/append.lua",
        "local gone = math.max(0, receipt - ledger[1])",
        "local gone = 0",
        f"{_TESTS}/buffer/test_receipts.py::test_a_ledger_that_was_set_back[valkey]",
    ),
    Mutant(
        "an acknowledgement of what is gone counts",
        "ingest",
        "hb_assets/buffer/scripts/acknowledge.lua",
        "acknowledged = acknowledged + gone * heartbeats",
        "acknowledged = acknowledged + (last - first + 1) * heartbeats",
        f"{_TESTS}/buffer/test_consumer.py::"
        "test_a_zombies_acknowledgement_counts_what_it_deletes[valkey]",
    ),
    Mutant(
        "entries that somebody deleted are no loss",
        "ingest",
        "hb_assets/buffer/scripts/sweep.lua",
        "cursor, moved, lost = page[1], moved + #page[2], lost + #page[3]",
        "cursor, moved = page[1], moved + #page[2]",
        f"{_TESTS}/buffer/test_consumer.py::"
        "test_entries_deleted_while_pending_are_counted_as_lost[valkey-idle]",
    ),
    Mutant(
        "entries that nobody has pending stay there",
        "ingest",
        "hb_assets/buffer/scripts/gaps.lua",
        "if #redis.call('XPENDING', KEYS[1], ARGV[1], entry[1], entry[1], 1) == 0 then",
        "if false then",
        f"{_TESTS}/buffer/test_consumer.py::"
        "test_entries_that_nobody_would_hand_out_are_adopted[valkey]",
    ),
    Mutant(
        "the drain acknowledges what it couldn't write",
        "ingest",
        "hb_assets/pipeline/drain.py",
        "        if writing is not None:\n"
        "            done = done.plus(writing.result())\n"
        "    # Everything is durable now;",
        "        if writing is not None:\n"
        "            wait([writing])\n"
        "    # Everything is durable now;",
        f"{_TESTS}/pipeline/test_drain.py::test_disk_that_is_full",
    ),
    Mutant(
        "refused records are dropped by the drain",
        "ingest",
        "hb_assets/pipeline/drain.py",
        "    quarantine.publish(lake, rejected)\n",
        "",
        f"{_TESTS}/pipeline/test_drain.py::test_odd_entries",
    ),
    Mutant(
        "a drain that slept brings a forgotten user back",
        "ingest",
        "hb_assets/pipeline/drain.py",
        "published = fragments.publish(lake, kept)",
        "published = fragments.publish(lake, part.rows)",
        f"{_TESTS}/pipeline/test_erasure.py::test_a_drain_that_slept_through_the_first_consolidation",
    ),
    Mutant(
        "a file is named before it is durable",
        "ingest",
        f"{_LAKE}/storage/durable_files.py",
        "        self._sync()\n        try:\n            os.link(self.path, final)",
        "        try:\n            os.link(self.path, final)",
        f"{_TESTS}/lake/storage/test_durable_files.py::test_order_of_system_calls",
    ),
    Mutant(
        "a file's name isn't durable",
        "ingest",
        f"{_LAKE}/storage/durable_files.py",
        "        self._named = True\n"
        "        self.path.unlink(missing_ok=True)\n"
        "        sync_folder(final.parent)",
        "        self._named = True\n        self.path.unlink(missing_ok=True)",
        f"{_TESTS}/lake/storage/test_durable_files.py::test_order_of_system_calls",
    ),
    Mutant(
        "a fraction behind a minute is taken for a second",
        "ingest",
        "hb_assets/core/record.py",
        "if not _ISO_8601.fullmatch(text):",
        "if not text:",
        f"{_TESTS}/core/test_record.py::test_the_documented_forms_of_a_time",
    ),
    Mutant(
        "the last of two values of one field counts",
        "ingest",
        "hb_assets/core/record.py",
        "return text.count(b'\"') == quotes and not _is_odd(text)",
        "return not _is_odd(text)",
        f"{_TESTS}/core/test_record.py::test_a_field_that_is_named_twice_is_refused",
    ),
    Mutant(
        "the drain takes the last of two values of one field",
        "ingest",
        "hb_assets/core/record.py",
        "if line.count(b'\"') == quotes and not (odd and _is_odd(line)):",
        "if not (odd and _is_odd(line)):",
        f"{_TESTS}/lake/ingest/test_decode.py::test_what_readers_of_json_differ_about_is_refused",
    ),
    Mutant(
        "rows behind a refused line get the places of others",
        "ingest",
        f"{_LAKE}/ingest/decode.py",
        "positions = sorted({*positions}.difference(first + number for number in doubtful))",
        "positions = list(positions)[: len(found)]",
        f"{_TESTS}/lake/ingest/test_decode.py::test_every_line_ends_where_the_record_says",
    ),
    # -- consolidation and pruning
    Mutant(
        "raw is listed before the current file is read",
        "consolidation and pruning",
        f"{_LAKE}/compaction/consolidation.py",
        "        published = task.published()\n        raw, gaps = task.listing()\n",
        "        raw, gaps = task.listing()\n        published = task.published()\n",
        f"{_TESTS}/lake/compaction/test_consolidation.py::"
        "test_rebuild_overtaken_between_the_published_file_and_raw",
    ),
    Mutant(
        "who was overtaken publishes all the same",
        "consolidation and pruning",
        f"{_LAKE}/compaction/consolidation.py",
        "        if not task.is_published(published):\n            # Overtaken",
        "        if False:\n            # Overtaken",
        f"{_TESTS}/lake/compaction/test_consolidation.py::test_overtaken_by_one_who_knows_more",
    ),
    Mutant(
        "a file that fails its checks is published",
        "consolidation and pruning",
        f"{_LAKE}/compaction/consolidation.py",
        "        checks.require(figures, task.where)\n",
        "",
        f"{_TESTS}/lake/compaction/test_consolidation.py::test_failed_check_leaves_everything_in_place",
    ),
    Mutant(
        "a rebuild forgets what was pruned",
        "consolidation and pruning",
        f"{_LAKE}/compaction/consolidation.py",
        "    if gone:\n        raise DamagedFileError(",
        "    if gone < 0:\n        raise DamagedFileError(",
        f"{_TESTS}/lake/compaction/test_pruning.py::test_rebuild_is_refused_once_raw_was_pruned",
    ),
    Mutant(
        "rows that were set aside lie below the watermark",
        "consolidation and pruning",
        f"{_LAKE}/compaction/consolidation.py",
        "for source, mark in task.watermarks.items() if source not in sources}",
        "for source, mark in task.watermarks.items()}",
        f"{_TESTS}/lake/integrity/test_damage.py::test_no_watermark_is_claimed_for_rows_that_were_set_aside",
    ),
    Mutant(
        "a watermark goes back",
        "consolidation and pruning",
        f"{_LAKE}/compaction/consolidation.py",
        "return {source: max(mark, before.get(source, mark)) for",
        "return {source: now.get(source, mark) for",
        f"{_TESTS}/lake/compaction/test_pruning.py::test_a_watermark_never_goes_back",
    ),
    Mutant(
        "names of pruned fragments go without a watermark",
        "consolidation and pruning",
        f"{_LAKE}/compaction/consolidation.py",
        "        and parsed.last <= watermark.get(parsed.source, (0, 0))\n",
        "",
        f"{_TESTS}/lake/compaction/test_pruning.py::"
        "test_a_fragment_that_is_away_stays_listed_above_the_watermark",
    ),
    Mutant(
        "rows that no fragment brought before are dropped as repeats of one that can't be read",
        "consolidation and pruning",
        f"{_LAKE}/compaction/unreadable.py",
        "HAVING bool_and(",
        "HAVING bool_or(true OR ",
        f"{_TESTS}/lake/test_recovery.py::test_what_repeats_an_included_fragment_that_was_set_aside_"
        "counts_once",
    ),
    Mutant(
        "rows that a fragment that can't be read brought before count twice",
        "consolidation and pruning",
        f"{_LAKE}/compaction/merge.py",
        "if inputs.unread else _ENTRIES.empty_table()",
        "if False else _ENTRIES.empty_table()",
        f"{_TESTS}/lake/test_recovery.py::test_what_repeats_an_included_fragment_that_was_set_aside_"
        "counts_once",
    ),
    Mutant(
        "the first arrival survives",
        "consolidation and pruning",
        f"{_LAKE}/compaction/merge.py",
        '        ORDER BY {", ".join((*ORDER, *ARRIVAL))}, late DESC\n',
        '        ORDER BY {", ".join((*ORDER, *(f"{name} DESC" for name in ARRIVAL)))}, late DESC\n',
        f"{_TESTS}/lake/compaction/test_merge.py::test_arrival_decides_whatever_the_order_of_files",
    ),
    Mutant(
        "a published row stays beside a pending one of its key",
        "consolidation and pruning",
        f"{_LAKE}/compaction/row_groups.py",
        """    SELECT file_row_number FROM base SEMI JOIN new USING ({", ".join(KEY)})\n""",
        """    SELECT file_row_number FROM base SEMI JOIN new USING ({", ".join(KEY)}) WHERE false\n""",
        f"{_TESTS}/lake/compaction/test_merge.py::"
        "test_only_a_row_group_with_the_key_of_a_pending_row_is_sorted",
    ),
    Mutant(
        "an included row that comes again is merged again",
        "consolidation and pruning",
        f"{_LAKE}/compaction/merge.py",
        "ANTI JOIN (SELECT {_ROW} FROM included) AS known USING ({_ROW})\n",
        "",
        f"{_TESTS}/lake/test_ledger.py::test_adds_up",
    ),
    Mutant(
        "the pruner fences nobody",
        "consolidation and pruning",
        f"{_LAKE}/compaction/pruning.py",
        "        fence(lake, day, shard)\n        second",
        "        second",
        f"{_TESTS}/lake/compaction/test_pruning.py::test_a_consolidator_that_slept_is_fenced",
    ),
    Mutant(
        "the pruner trusts the file that it read first",
        "consolidation and pruning",
        f"{_LAKE}/compaction/pruning.py",
        "doomed = [one for one in old if str(one.name) in second.names]",
        "doomed = old",
        f"{_TESTS}/lake/compaction/test_pruning.py::test_a_pruner_keeps_what_the_file_lists_no_more",
    ),
    Mutant(
        "what isn't acknowledged is pruned",
        "consolidation and pruning",
        f"{_LAKE}/compaction/pruning.py",
        "        <= max(published.metadata.mark(one.name.source), acknowledged.get(",
        "        <= one.name.last or max(published.metadata.mark(one.name.source), acknowledged.get(",
        f"{_TESTS}/lake/compaction/test_pruning.py::test_without_a_watermark_nothing_goes",
    ),
    Mutant(
        "nothing is too young to be pruned",
        "consolidation and pruning",
        f"{_LAKE}/compaction/pruning.py",
        "return fragment.path.stat().st_mtime < latest",
        "return fragment.path.exists()",
        f"{_TESTS}/lake/compaction/test_pruning.py::test_only_what_is_consolidated_acknowledged_and_old",
    ),
    Mutant(
        "raw is pruned for a damaged file",
        "consolidation and pruning",
        f"{_LAKE}/compaction/pruning.py",
        "        parquet.verify(second.path)\n",
        "",
        f"{_TESTS}/lake/compaction/test_pruning.py::test_nothing_is_pruned_for_a_file_that_is_damaged",
    ),
    Mutant(
        "nothing says that raw alone hasn't all any more",
        "consolidation and pruning",
        f"{_LAKE}/compaction/pruning.py",
        "        mark_incomplete(lake, day, shard)\n",
        "",
        f"{_TESTS}/lake/compaction/test_pruning.py::test_a_damaged_file_whose_raw_was_pruned_stays",
    ),
    Mutant(
        "rows that lie in quarantine too are pruned",
        "consolidation and pruning",
        f"{_LAKE}/compaction/pruning.py",
        "return [one for one in listed if str(one.path) not in held]",
        "return [one for one in listed if one.path not in held]",
        f"{_TESTS}/lake/compaction/test_pruning.py::"
        "test_rows_that_lie_in_quarantine_too_are_kept_for_the_audit",
    ),
    Mutant(
        "temp files in use are swept",
        "consolidation and pruning",
        f"{_LAKE}/compaction/pruning.py",
        "if path.stat().st_mtime < oldest:",
        "if path.exists():",
        f"{_TESTS}/lake/compaction/test_pruning.py::test_leftovers_of_crashes_go_after_a_safe_age",
    ),
    Mutant(
        "what a restored file needs is pruned",
        "consolidation and pruning",
        f"{_LAKE}/compaction/pruning.py",
        "if not listed or accepted_losses.stems(lake, HEARTBEATS, day, shard):",
        "if not listed:",
        f"{_TESTS}/lake/test_recovery.py::test_sound_row_groups_are_kept",
    ),
    Mutant(
        "what a restored fragment needs is pruned",
        "consolidation and pruning",
        f"{_LAKE}/compaction/pruning.py",
        "free = [one for one in listed if not any(one.name.overlaps(name) for name in lost)]",
        "free = listed",
        f"{_TESTS}/lake/test_recovery.py::"
        "test_how_many_rows_is_a_bound_where_they_may_have_come_twice",
    ),
    Mutant(
        "a fragment that was given up and put back is taken for a replay",
        "consolidation and pruning",
        f"{_LAKE}/files/consolidated.py",
        "return self.excepted.get(str(name), self.mark(name.source))",
        "return self.mark(name.source)",
        f"{_TESTS}/lake/test_recovery.py::test_a_fragment_given_up_and_put_back",
    ),
    # -- reads
    Mutant(
        "a reader looks at the consolidated file before raw",
        "reads",
        f"{_LAKE}/query/user_scan.py",
        "    raw = catalog.names(folder)\n"
        "    path = layout.consolidated_file(lake.root, day, shard)\n"
        "    seen, published = (None, None) if raw_alone else _published_at(path)\n",
        "    path = layout.consolidated_file(lake.root, day, shard)\n"
        "    seen, published = (None, None) if raw_alone else _published_at(path)\n"
        "    raw = catalog.names(folder)\n",
        f"{_TESTS}/lake/compaction/test_pruning.py::test_reader_overtaken_between_raw_and_the_published_file",
    ),
    Mutant(
        "what is pending isn't answered",
        "reads",
        f"{_LAKE}/query/user_scan.py",
        "for name in sorted(raw - included) if FragmentName.parse(name))",
        "for name in sorted(raw & included) if FragmentName.parse(name))",
        f"{_TESTS}/lake/query/test_series.py::test_only_what_is_asked_for_is_read",
    ),
    Mutant(
        "a list of fragments is remembered too early",
        "reads",
        f"{_LAKE}/storage/catalog.py",
        "settled = looked_at - since >= SETTLED_NS / 1e9",
        "settled = True",
        f"{_TESTS}/lake/storage/test_catalog.py::"
        "test_a_list_of_fragments_is_remembered_until_there_is_another",
    ),
    Mutant(
        "a row group's first user isn't found",
        "reads",
        f"{_LAKE}/query/user_scan.py",
        "if self.users and not self.users[0] <= wanted.user_id <= self.users[1]:",
        "if self.users and not self.users[0] < wanted.user_id <= self.users[1]:",
        f"{_TESTS}/lake/query/test_series.py::test_only_what_is_asked_for_is_read",
    ),
    Mutant(
        "a row group's last instant isn't found",
        "reads",
        f"{_LAKE}/query/user_scan.py",
        "self.times[0] < wanted.end_ms and self.times[1] >= wanted.start_ms",
        "self.times[0] < wanted.end_ms and self.times[1] > wanted.start_ms",
        f"{_TESTS}/lake/query/test_series.py::test_a_correction_that_is_pending_is_answered",
    ),
    Mutant(
        "pending rows come without their arrivals",
        "reads",
        f"{_LAKE}/query/user_scan.py",
        "identified |= wanted.cutoffs is not None or any(groups for *_, groups in chosen)",
        "identified |= wanted.cutoffs is not None",
        f"{_TESTS}/lake/query/test_series.py::test_a_correction_that_is_pending_is_answered",
    ),
    Mutant(
        "a forgotten user's rows are answered",
        "reads",
        f"{_LAKE}/query/user_scan.py",
        "            found = found.taken(~tombstones.reached_by(found.arrival, wanted.cutoffs))\n",
        "            pass\n",
        f"{_TESTS}/lake/query/test_series.py::test_what_waits_in_the_buffer_of_a_forgotten_user",
    ),
    Mutant(
        "a heart rate out of bounds is answered",
        "reads",
        f"{_LAKE}/query/user_scan.py",
        "    fragments.require_bpm(found.heart_rate.min(), found.heart_rate.max(), path)\n",
        "",
        f"{_TESTS}/lake/query/test_damaged_answers.py::test_a_forged_heart_rate_is_no_answer",
    ),
    Mutant(
        "a footer's bounds aren't looked at",
        "reads",
        f"{_LAKE}/files/fragments.py",
        "and not first <= times.min_raw <= times.max_raw < end",
        "and times.min_raw < 0",
        f"{_TESTS}/lake/query/test_damaged_answers.py::test_another_days_rows_are_no_answer",
    ),
    Mutant(
        "a file that was replaced meanwhile is read",
        "reads",
        f"{_LAKE}/storage/verified.py",
        "    for path, before in seen.items():\n        _require_unchanged(path, before)\n",
        "",
        f"{_TESTS}/lake/storage/test_verified.py::"
        "test_a_file_that_replaces_a_verified_one_is_not_read_for_it",
    ),
    Mutant(
        "pyarrow reads unverified files",
        "reads",
        f"{_LAKE}/storage/verified.py",
        "        footer = parquet.verify_open(source, path)\n",
        "        footer = None\n",
        f"{_TESTS}/lake/storage/test_verified.py::test_no_flipped_bit_is_read",
    ),
    Mutant(
        "DuckDB reads unverified files",
        "reads",
        f"{_LAKE}/storage/verified.py",
        "seen[path], _ = whole(path)",
        "seen[path] = look(path)",
        f"{_TESTS}/lake/storage/test_verified.py::test_no_flipped_bit_is_read",
    ),
    Mutant(
        "pages aren't held to their checksums",
        "reads",
        f"{_LAKE}/storage/parquet.py",
        "page_checksum_verification=True,",
        "page_checksum_verification=False,",
        f"{_TESTS}/lake/storage/test_verified.py::"
        "test_pages_are_held_to_their_checksums_though_the_file_looks_the_same",
    ),
    Mutant(
        "a file that changes while it is read goes unnoticed",
        "reads",
        f"{_LAKE}/storage/verified.py",
        "        if not _seen(source).has_bytes_of(seen):\n            raise parquet.damaged(",
        "        if not seen:\n            raise parquet.damaged(",
        f"{_TESTS}/lake/storage/test_verified.py::test_a_change_while_it_is_read_is_noticed",
    ),
    Mutant(
        "a reader doesn't ask again when a file has gone",
        "reads",
        f"{_LAKE}/query/series.py",
        "_ATTEMPTS = 10",
        "_ATTEMPTS = 1",
        f"{_TESTS}/lake/compaction/test_pruning.py::test_reader_overtaken_by_a_pruner",
    ),
    Mutant(
        "a page parts a bucket",
        "reads",
        f"{_LAKE}/query/series.py",
        "keep = int(starts.searchsorted(starts[limit]))",
        "keep = limit",
        f"{_TESTS}/lake/query/test_series.py::test_a_page_ends_with_a_whole_bucket",
    ),
    Mutant(
        "the first arrival of a key is answered",
        "reads",
        f"{_LAKE}/query/aggregate.py",
        "return ordered.taken(order[np.append(~again, True)])",
        "return ordered.taken(order[np.insert(~again, 0, True)])",
        f"{_TESTS}/lake/query/test_series.py::test_a_correction_that_is_pending_is_answered",
    ),
    Mutant(
        "device priority is turned round",
        "reads",
        f"{_LAKE}/query/aggregate.py",
        "place = {name: at for at, name in reversed(list(enumerate(priority)))}",
        "place = {name: -at for at, name in reversed(list(enumerate(priority)))}",
        f"{_TESTS}/lake/query/test_series.py::test_of_two_devices_at_one_instant_the_trusted_one_is_answered",
    ),
    # -- ledger: what the audit proves
    Mutant(
        "missing heartbeats are no difference",
        "ledger",
        "hb_assets/pipeline/audit.py",
        "    if missing:\n",
        "    if missing < 0:\n",
        f"{_TESTS}/pipeline/test_audit.py::"
        "test_finds[valkey-delete_fragment-1 heartbeats are missing: 10 were acknowledged]",
    ),
    Mutant(
        "heartbeats too many are no difference",
        "ledger",
        "hb_assets/pipeline/audit.py",
        "elif in_lake + accepted.rows > high + in_flight and not unknown:",
        "elif unknown:",
        f"{_TESTS}/pipeline/test_audit.py::test_finds[valkey-flush-more than this buffer ever acknowledged]",
    ),
    Mutant(
        "what a server forgot isn't asked of the lake",
        "ledger",
        "hb_assets/pipeline/audit.py",
        "low = sum(shard.acknowledged for shard in before.states) + set_back",
        "low = sum(shard.acknowledged for shard in before.states)",
        f"{_TESTS}/pipeline/test_audit.py::"
        "test_finds[valkey-lose_ledger-Redis was set back by 8 that it had confirmed]",
    ),
    Mutant(
        "what lies in the stream isn't counted",
        "ledger",
        "hb_assets/pipeline/audit.py",
        "if not was.appended - now.acknowledged <= found <= now.appended - was.acknowledged:",
        "if found < 0:",
        f"{_TESTS}/pipeline/test_audit.py::"
        "test_finds[valkey-delete_entry-but 0 lie in the stream instead of 2]",
    ),
    Mutant(
        "entries that were deleted while pending aren't told",
        "ledger",
        "hb_assets/pipeline/audit.py",
        "*depth.losses(after.states), ",
        "",
        f"{_TESTS}/pipeline/test_audit.py::test_entries_deleted_while_pending_are_named[valkey]",
    ),
    Mutant(
        "a row in a fragment and in quarantine counts twice",
        "ledger",
        f"{_LAKE}/ledger.py",
        "in_fragments = _in_fragments(lake, connection, faults) if records else 0",
        "in_fragments = 0",
        f"{_TESTS}/pipeline/test_drain.py::test_a_row_in_a_fragment_and_in_the_quarantine_is_the_fragments",
    ),
    Mutant(
        "an entry's own count is believed",
        "ledger",
        "hb_assets/buffer/scripts/acknowledge.lua",
        "    if n == heartbeats then",
        "    if n >= 0 then",
        f"{_TESTS}/pipeline/test_audit.py::test_a_foreign_entry_that_lies_about_its_lines[valkey]",
    ),
    Mutant(
        "an accepted loss is still missed",
        "ledger",
        "hb_assets/pipeline/audit.py",
        "    written_off = accepted.rows\n",
        "    written_off = 0\n",
        f"{_TESTS}/pipeline/test_audit.py::test_a_loss_that_a_person_accepted[valkey]",
    ),
    Mutant(
        "an accepted loss covers all that is missing",
        "ledger",
        "hb_assets/pipeline/audit.py",
        "written_off += min(accepted.at_most, max(0, low - in_lake - accepted.rows))",
        "written_off += max(0, low - in_lake - accepted.rows)",
        f"{_TESTS}/pipeline/test_audit.py::test_a_loss_that_a_person_accepted[valkey]",
    ),
    Mutant(
        "an accepted loss counts although its file is back",
        "ledger",
        f"{_LAKE}/files/accepted_losses.py",
        "if not _is_back(lake, path, found):",
        "if found:",
        f"{_TESTS}/lake/test_recovery.py::test_a_crash_between_two_steps_of_a_restore",
    ),
    Mutant(
        "a footer's rows aren't held against raw",
        "ledger",
        f"{_LAKE}/ledger.py",
        "if whole and listed_rows != metadata.rows + metadata.uncounted:",
        "if listed_rows < 0:",
        f"{_TESTS}/lake/test_ledger.py::test_tampered_counts",
    ),
    Mutant(
        "the sum of a footer isn't checked",
        "ledger",
        f"{_LAKE}/files/consolidated.py",
        "if self.rows != self.unique + self.superseded + self.erased:",
        "if self.rows < 0:",
        f"{_TESTS}/lake/test_ledger.py::test_tampered_counts",
    ),
    Mutant(
        "the split of what was superseded isn't checked",
        "ledger",
        f"{_LAKE}/files/consolidated.py",
        "if self.superseded != self.repeats + self.corrections:",
        "if self.superseded < 0:",
        f"{_TESTS}/lake/test_ledger.py::test_tampered_counts",
    ),
    Mutant(
        "a consolidated file's rows aren't counted",
        "ledger",
        f"{_LAKE}/files/consolidated.py",
        "if rows_in_file != self.unique:",
        "if rows_in_file < 0:",
        f"{_TESTS}/lake/test_ledger.py::test_row_that_is_gone",
    ),
    Mutant(
        "distinct keys aren't counted from raw",
        "ledger",
        f"{_LAKE}/ledger.py",
        "if keys != metadata.unique:",
        "if keys < 0:",
        f"{_TESTS}/lake/test_ledger.py::test_deep_counts_keys_from_raw",
    ),
    Mutant(
        "a row that was delivered twice counts twice",
        "ledger",
        f"{_LAKE}/files/fragments.py",
        "(SELECT DISTINCT {_ROW} FROM raw)",
        "(SELECT {_ROW} FROM raw)",
        f"{_TESTS}/lake/test_ledger.py::test_adds_up",
    ),
    Mutant(
        "a kill loses the count of a request that was answered",
        "ledger",
        "hb_assets/gateway/middleware.py",
        'elif not message.get("more_body"):',
        "elif False:",
        f"{_TESTS}/gateway/test_middleware.py::"
        "test_a_request_is_counted_once_and_before_the_last_of_its_answer_is_sent",
    ),
    Mutant(
        "workers of a gateway write each other's counts",
        "ledger",
        "hb_assets/gateway/observability/tallies.py",
        "other.worker = worker",
        "other.worker = 0",
        f"{_TESTS}/gateway/observability/test_tallies.py::"
        "test_a_killed_worker_keeps_its_row_and_its_successor_counts_on",
    ),
    Mutant(
        "replays below the watermark are counted",
        "ledger",
        f"{_LAKE}/compaction/merge.py",
        "FROM ({_ARRIVED}) WHERE NOT late)",
        "FROM ({_ARRIVED}))",
        f"{_TESTS}/lake/compaction/test_pruning.py::test_what_comes_again_after_the_prune_is_a_replay",
    ),
    Mutant(
        "replays count as superseded",
        "ledger",
        f"{_LAKE}/compaction/merge.py",
        "    WHEN {_SAME_ARRIVAL} THEN {_REPLAY}\n",
        "",
        f"{_TESTS}/lake/test_ledger.py::test_adds_up",
    ),
)
