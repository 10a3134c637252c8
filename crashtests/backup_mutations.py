"""Defects of backups, archives and restores: one at least for each `Invariant:` and `Durability:` of kvwal/backup.

The part is `tests`, and the test that must fail is noted with each.
"""

from __future__ import annotations

from crashtests.mutations import Edit, Mutant

__all__ = ["BACKUP_MUTANTS"]

_ARCHIVER = "kvwal.backup.archiver:Archiver."
_BACKUP = "kvwal.backup.making:_Backup."
_DIRECTORY = "kvwal.backup.port:DirectoryDestination."
_MERGING = "kvwal.backup.keeping:Merging."
_RESTORE = "kvwal.backup.restoring:_Restore."


def _mutant(name: str, test: str, *edits: tuple[str, str, str]) -> Mutant:
    return Mutant(name, "tests", tuple(Edit(*edit) for edit in edits), f"tests/{test}")


BACKUP_MUTANTS: tuple[Mutant, ...] = (
    # --- making ---
    _mutant(
        "a backup does not hold the generation that it reads",
        "backup/test_making.py::test_commits_and_checkpoints_go_on_meanwhile",
        (
            _BACKUP + "run",
            "as (meta, pager):\n            with",
            "as (meta, pager):\n            pass\n        if True:\n            with",
        ),
    ),
    _mutant(
        "a page is backed up without proof",
        "backup/test_making.py::test_a_damaged_page_fails_and_is_named_and_not_copied",
        (
            "kvwal.backup.reach:_proved",
            " or crc32c(view[place : place + size], page) != extents.crcs[each]",
            "",
        ),
    ),
    _mutant(
        "a large value is backed up without proof",
        "backup/test_making.py::test_a_damaged_large_value_is_not_copied",
        ("kvwal.backup.reach:_read_large", "if found != crc:", "if False:"),
        ("kvwal.backup.reach:_proved", " or crc32c(view[place : place + size], page) != extents.crcs[each]", ""),
    ),
    _mutant(
        "a backup of a generation that went is not begun again",
        "backup/test_making.py::test_beside_a_writer_that_makes_checkpoints_it_begins_again",
        ("kvwal.backup.making:backup", "if not left:", "if True:"),
    ),
    _mutant(
        "an object is built on that came back with other bytes",
        "backup/test_making.py::test_what_the_destination_stores_wrongly_is_told_and_not_built_on",
        (_BACKUP + "_read_back", "if (at, found) != (size, crc):", "if False:"),
    ),
    # --- what a difference leaves out ---
    _mutant(
        "a page is taken for the parent's by its number and size",
        "backup/test_making.py::test_pages_of_a_copy_that_went_on_are_not_taken_for_the_stores_own",
        ("kvwal.backup.reach:Reach.find", "self._crcs[at] != crc or ", ""),
    ),
    # --- a directory as a destination ---
    _mutant(
        "a name that is taken is not flushed",
        "archive/test_port.py::test_a_writer_that_is_killed_leaves_no_object_that_the_next_one_takes_for_durable",
        (_DIRECTORY + "put_new", "directory.sync()\n", "pass\n"),
    ),
    _mutant(
        "an object gets its name before it is on disk",
        "archive/test_port.py::test_a_power_cut_at_any_operation_leaves_whole_objects_and_all_that_were_acknowledged",
        (_DIRECTORY + "_publish", "file.datasync()\n", "pass\n"),
    ),
    _mutant(
        "the name of an object is not flushed",
        "archive/test_port.py::test_a_power_cut_at_any_operation_leaves_whole_objects_and_all_that_were_acknowledged",
        (_DIRECTORY + "_publish", "directory.sync()\n", "pass\n"),
    ),
    _mutant(
        "a directory of the destination is not flushed into its parent",
        "archive/test_port.py::test_a_power_cut_at_any_operation_leaves_whole_objects_and_all_that_were_acknowledged",
        (_DIRECTORY + "_make_one", "directory.sync_parent()\n", "pass\n"),
    ),
    # --- the archiver ---
    _mutant(
        "the mark moves before the unit is put",
        "archive/test_archiver_failures.py::test_the_mark_stays_until_what_comes_back_is_what_was_put",
        (
            _ARCHIVER + "_put",
            "destination, revision = self._destination, 0\n",
            "destination, revision = self._destination, 0\n"
            "        self._claim.move(builder.last, builder.digest)\n"
            "        self.mark = builder.last\n",
        ),
    ),
    _mutant(
        "an answer is taken for the unit",
        "archive/test_archiver_failures.py::test_the_mark_stays_until_what_comes_back_is_what_was_put",
        (_ARCHIVER + "_put", "if destination.get(name, size=len(data) + 1) != data:", "if False:"),
    ),
    _mutant(
        "log is let go of as it becomes durable",
        "archive/test_archiver.py::test_each_unit_lets_go_of_its_own_commits_alone",
        (_ARCHIVER + "_put", "advance(builder.last)", "advance(self._engine.upkeep.durable_seqno)"),
    ),
    _mutant(
        "an archiver that begins holds the log from what is durable on",
        "archive/test_archiver.py::test_what_was_committed_without_it_is_held_when_it_begins",
        (_ARCHIVER + "_attach", "hold.advance(position)", "hold.advance(durable)"),
    ),
    _mutant(
        "the log is held only once the first base is made",
        "archive/test_beginning.py::test_commits_and_checkpoints_while_the_first_base_is_made",
        (
            _ARCHIVER + "_begin",
            "hold = upkeep.consumers.begin_hold(_PURPOSE, upkeep.durable_seqno, self._limits)\n        try:\n"
            "            self._make_base(self._engine, self._destination, lambda: None)\n",
            "self._make_base(self._engine, self._destination, lambda: None)\n"
            "        hold = upkeep.consumers.begin_hold(_PURPOSE, upkeep.durable_seqno, self._limits)\n        try:\n",
        ),
    ),
    _mutant(
        "a base that was found is not made durable",
        "archive/test_archiver.py::test_what_a_killed_archiver_has_left_is_made_durable_before_it_is_relied_on",
        ("kvwal.backup.adopting:adopt", 'if destination.put_new(str(base), b""):', "if False:"),
    ),
    _mutant(
        "a unit that was found is not made durable",
        "archive/test_archiver.py::test_what_a_killed_archiver_has_left_is_made_durable_before_it_is_relied_on",
        ("kvwal.backup.adopting:adopt", "destination.put_new(str(name), data)", "pass"),
    ),
    # --- what is kept ---
    _mutant(
        "units are deleted before the merged one is read back",
        "archive/test_keeping.py::test_a_merged_unit_that_comes_back_damaged_is_not_relied_on",
        (
            _MERGING + "_merge",
            "self._delete_merged(group, unit.header.name)",
            "[self._destination.delete(str(each)) for each in group]",
        ),
    ),
    _mutant(
        "units are deleted for a merged one of another chain",
        "archive/test_replaying.py::test_a_merged_unit_of_another_chain_takes_nothing_away",
        (_MERGING + "_delete_merged", "== (mine.before, mine.after)", "is not None"),
    ),
    _mutant(
        "a merged unit that was found is not made durable",
        "archive/test_keeping.py::test_merging_that_was_killed_before_the_flush_is_not_relied_on",
        (_MERGING + "_delete_merged", "self._destination.put_new(text, data)", "pass"),
    ),
    _mutant(
        "what thinning leaves is not proved",
        "archive/test_keeping.py::test_pruning_that_would_take_a_moment_that_is_to_stay_is_refused_by_name",
        ("kvwal.backup.keeping:plan_pruning", "_prove(whole, after, keep_from, kept)", "pass"),
    ),
    # --- restoring ---
    _mutant(
        "a store gets its name before it is verified",
        "backup/test_restoring.py::test_the_log_that_was_made_is_proved_before_the_store_has_its_name",
        (_RESTORE + "run", "position = self._verified(", "self._name()\n            position = self._verified("),
    ),
    _mutant(
        "pages of a restore get their name before they are on disk",
        "backup/test_power.py::test_a_restore_that_was_cut_off_leaves_nothing_or_all_and_goes_on",
        (_RESTORE + "_write_pages", "file.sync()", "pass"),
    ),
    _mutant(
        "the marker of a restore may outlive its end",
        "backup/test_power.py::test_a_restore_that_was_cut_off_leaves_nothing_or_all_and_goes_on",
        (_RESTORE + "run", "directory.sync()\n", "pass\n"),
    ),
    _mutant(
        "a restored store may not be at its place yet",
        "backup/test_power.py::test_a_restore_that_was_cut_off_leaves_nothing_or_all_and_goes_on",
        (_RESTORE + "_name", "directory.sync()", "pass"),
    ),
    _mutant(
        "the marker of a restore goes before its pages are a store for good",
        "backup/test_power.py::test_a_restore_that_was_cut_off_leaves_nothing_or_all_and_goes_on",
        (_RESTORE + "_make", "before the marker goes.\n            directory.sync()", "before the marker goes."),
    ),
    _mutant(
        "what a step made is removed before what says that it has ended",
        "backup/test_power.py::test_a_restore_of_another_moment_that_was_cut_off_begins_anew_or_goes_on",
        ("kvwal.backup.aside:begin", "in ((DATA, PAGES), names)", "in (set(names) - {DATA, PAGES}, names)"),
    ),
    _mutant(
        "what a step made is removed together with what says that it has ended",
        "backup/test_power.py::test_a_restore_of_another_moment_that_was_cut_off_begins_anew_or_goes_on",
        ("kvwal.backup.aside:begin", "unlink(name)\n        directory.sync()\n", "unlink(name)\n"),
    ),
    _mutant(
        "a restore begins before its marker is on disk",
        "backup/test_power.py::test_a_restore_that_was_cut_off_leaves_nothing_or_all_and_goes_on",
        ("kvwal.backup.aside:begin", "directory.sync()\n    return line, False", "return line, False"),
    ),
)
