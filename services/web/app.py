"""The wiring of the web service: which parts there are and how they hold each other."""

from dataclasses import dataclass

from headway import queue
from headway.events import Events, layer
from headway.files import Files
from headway.lifecycle import Lifecycle
from headway.queue import Queue
from headway.rooms import Rooms
from headway.schedules import Schedules
from headway.settings import Settings
from headway.sources import Sources
from headway.store import Store
from headway.store.live import LiveStore
from headway.store.sets import SetStore
from headway.uploads import Uploads
from services.web.api.auth import Keyring
from services.web.api.catalog import Catalog
from services.web.api.fetches import Fetching
from services.web.api.tickets import Tickets
from services.web.live.hub import Hub
from services.web.live.jobs import Jobs
from services.web.live.lines import heard
from services.web.live.presence import Presence
from services.web.live.revocation import Revocation
from services.web.live.rooms import LiveRooms
from services.web.live.session import Sort
from services.web.live.sessions import Sessions
from services.web.live.sets import Sets
from services.web.live.waits import Waits


@dataclass(frozen=True, slots=True)
class App:
    """What views and consumers work with; one for each process."""

    settings: Settings
    store: Store
    lifecycle: Lifecycle
    schedules: Schedules
    rooms: Rooms
    files: Files
    uploads: Uploads
    sources: Sources
    fetching: Fetching
    keyring: Keyring
    tickets: Tickets
    presence: Presence
    catalog: Catalog
    hub: Hub
    sessions: Sessions
    waits: Waits
    revocation: Revocation
    queue: Queue
    events: Events

    @classmethod
    async def open(cls, settings: Settings) -> "App":
        """Connect lazily to everything: a Postgres or Redis that is away shows in answers, not here."""
        store = Store(settings.database_url.get_secret_value(), pool=settings.database_pool)
        await store.open()
        redis_url = settings.redis_url.get_secret_value()
        jobs = Queue(queue.connect(redis_url))
        events = Events(layer(redis_url))
        hub = Hub(redis_url, events.layer, heard)
        live = LiveStore(store)
        followed = Jobs(live, hub)
        lifecycle = Lifecycle(store, jobs, events)
        rooms, presence = Rooms(store, events), Presence(jobs.redis)
        sorts: dict[str, Sort] = {
            "jobs": followed,
            "sets": Sets(live, SetStore(store), hub, keep=settings.keep_days * 86400),
            "rooms": LiveRooms(rooms, presence, hub, events),
        }
        sessions = Sessions(hub, sorts, most=settings.connections)
        files = Files(settings.files_location, max_size=settings.max_file, options=settings.files_options)
        keyring = Keyring(store, settings.key_pepper.get_secret_value())
        return cls(
            settings=settings,
            store=store,
            lifecycle=lifecycle,
            schedules=Schedules(store, lifecycle),
            rooms=rooms,
            files=files,
            uploads=Uploads.of(settings, store, files),
            sources=Sources(settings.sources, pool=settings.source_pool),
            fetching=Fetching(settings),
            keyring=keyring,
            tickets=Tickets(jobs.redis, keyring),
            presence=presence,
            catalog=Catalog(store),
            hub=hub,
            sessions=sessions,
            revocation=Revocation(store, sessions.open),
            waits=Waits(followed.find, hub),
            queue=jobs,
            events=events,
        )

    async def close(self) -> None:
        await self.revocation.close()
        await self.sessions.close()
        await self.hub.close()
        await self.sources.close()
        await self.fetching.close()
        await self.lifecycle.close()
        await self.queue.close()
        await self.events.close()
        await self.store.close()
