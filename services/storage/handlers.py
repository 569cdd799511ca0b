"""What storage does when it is asked, and when its own events come back to it."""

import asyncio
import time
from functools import reduce

import msgspec

from fedota.contracts.commands import (
    AnnouncedFile,
    Download,
    PrepareUpload,
    PresignDownload,
    Reply,
    Request,
    StoreFiles,
    UploadSlot,
    UploadSlots,
)
from fedota.contracts.runtime import Presigned, PresignRequest
from fedota.errors import FedotaError, Problem
from fedota.events import Event, NewEvent, to_json
from fedota.events.storage import FilesDeleted, FilesStored
from fedota.kernel.bus import read_request
from fedota.kernel.event_log import Append, Appended, Context, EventLog, fingerprint, log_needed
from services.storage import domain
from services.storage.blobs import Blobs
from services.storage.domain import Fault, State
from services.storage.keys import file_key, manifest_key, require_problem_id, require_readable, require_writable
from services.storage.model_file import HEAD, model_fault
from services.storage.turns import Turns

Faults = dict[str, Fault]


class Handlers:
    """One method a command, one for the coordinators' question, one reaction."""

    def __init__(self, log: EventLog, blobs: Blobs, turns: Turns, link_seconds: int) -> None:
        self._log = log
        self._blobs = blobs
        self._turns = turns
        self._link_seconds = link_seconds

    async def prepare_upload(self, _: Request, command: PrepareUpload) -> Reply:
        """A slot for each file that is not there.

        An object that was uploaded and not claimed yet needs none either: its slot would refuse a second PUT. Should it
        be wrong, `StoreFiles` finds that and removes it, and the next call has a slot.
        """
        require_problem_id(command.problem_id)
        state = await load(self._log, command.problem_id)
        if faults := domain.announcement_faults(state, command.files):
            raise domain.rejection(faults)
        sizes = await asyncio.gather(*(self._blobs.size(file_key(command.problem_id, file)) for file in command.files))
        missing = [file for file, size in zip(command.files, sizes, strict=True) if size is None]
        slots = [self._slot(command.problem_id, file) for file in missing]
        return Reply(result=UploadSlots(slots=slots, seconds=self._link_seconds))

    async def store_files(self, request: Request, command: StoreFiles) -> Reply:
        """Verify what was uploaded, record it, and say so; or remove what is wrong, record that, and say why.

        Large files take longer than a caller waits. The work goes on, and the same request, sent again, waits for its
        turn and is then answered from the log.
        """
        require_problem_id(command.problem_id)
        async with self._turns.turn(command.problem_id, request.deadline - time.time()):
            appended = await self._store(request, command)
        if appended.result is not None:
            raise FedotaError.of(msgspec.json.decode(appended.result, type=Problem))
        return Reply(position=appended.position)

    async def presign_download(self, _: Request, command: PresignDownload) -> Reply:
        """A link to an object of the problem."""
        require_problem_id(command.problem_id)
        require_readable(command.problem_id, command.key)
        if await self._blobs.size(command.key) is None:
            raise FedotaError("not_found", "The problem has no object with this key. Look at its files and rounds.")
        url = self._blobs.presign_get(command.key).url
        return Reply(result=Download(url=url, seconds=self._link_seconds))

    async def presign(self, subject: str, body: bytes) -> bytes:
        """A URL for a coordinator, for the problem whose subject it asked on: its NATS account reaches no other.

        A PUT that S3 answers with 412 is as good as one that it took: the object is there from an earlier life.
        """
        problem_id = subject.split(".")[2]
        require_problem_id(problem_id)
        wanted = read_request(body, PresignRequest)
        if wanted.method == "GET":
            require_readable(problem_id, wanted.key)
            signed = self._blobs.presign_get(wanted.key)
        else:
            require_writable(problem_id, wanted)
            signed = self._blobs.presign_put(wanted.key, size=wanted.size, sha256=wanted.sha256)
        return to_json(Presigned(url=signed.url, headers=signed.headers))

    async def write_manifest(self, event: Event, _: FilesStored | FilesDeleted) -> None:
        """Put the list of the problem's files beside them: all of them, so that writing it again is harmless."""
        state = await load(self._log, event.problem_id)
        listed = domain.manifest(event.problem_id, state)
        await self._blobs.put(manifest_key(event.problem_id), msgspec.json.format(to_json(listed), indent=2))

    def _slot(self, problem_id: str, file: AnnouncedFile) -> UploadSlot:
        signed = self._blobs.presign_put(file_key(problem_id, file), size=file.size, sha256=file.sha256)
        return UploadSlot(name=file.name, url=signed.url, headers=signed.headers)

    async def _store(self, request: Request, command: StoreFiles) -> Appended:
        state = await load(self._log, command.problem_id)
        key, body = f"{request.actor}/{request.key}", fingerprint(b"StoreFiles", bytes(request.command))
        with log_needed():
            if answered := await self._log.recorded(key, body):
                return answered
        faults = await self._faults(state, command)
        data = domain.decide(state, command, faults)
        appended = await self._log.append(
            Append(
                subject=_stream(command.problem_id),
                events=[NewEvent(data=data)] if data else [],
                context=Context.of_request(request),
                expected=state.version,
                key=key,
                fingerprint=body,
                # a refusal is the request's result, so that a repetition is refused in the same words
                result=to_json(domain.rejection(faults).problem) if faults else None,
            )
        )
        # last: a crash leaves wrong bytes that nobody claimed and the next try finds, never a refusal without a reason
        for wrong in domain.discarded(state, command, faults):
            await self._blobs.remove(wrong)
        return appended

    async def _faults(self, state: State, command: StoreFiles) -> Faults:
        """What is wrong, by name of file. One after the other: a hundred files take one thread, not all of them."""
        faults = domain.announcement_faults(state, command.files)
        for file in command.files:
            if file.name not in faults and (fault := await self._fault(state, command.problem_id, file)):
                faults[file.name] = fault
        return faults

    async def _fault(self, state: State, problem_id: str, file: AnnouncedFile) -> Fault | None:
        key = file_key(problem_id, file)
        fault = domain.presence_fault(file, await self._blobs.size(key))
        if fault or domain.is_stored(state, problem_id, file):
            return fault
        is_model = file.role == "model"
        seen = await self._blobs.read(key, keep=HEAD if is_model else 0)
        no_model = await asyncio.to_thread(model_fault, seen.head, seen.size) if seen and is_model else None
        return domain.content_fault(file, seen, no_model)


async def load(log: EventLog, problem_id: str) -> State:
    """A problem's files as the log tells them now."""
    with log_needed():
        return reduce(domain.evolve, await log.stream(_stream(problem_id)), State())


def _stream(problem_id: str) -> str:
    return f"storage/{problem_id}"
