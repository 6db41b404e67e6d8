"""Stock Channels: a consumer for each socket, in one group, over the layer that `LAYER` names."""

import os

import django
from channels.generic.websocket import AsyncJsonWebsocketConsumer
from channels.routing import ProtocolTypeRouter, URLRouter
from django.conf import settings
from django.urls import path

settings.configure(
    CHANNEL_LAYERS={
        "default": {
            "BACKEND": {
                "core": "channels_redis.core.RedisChannelLayer",
                "pubsub": "channels_redis.pubsub.RedisPubSubChannelLayer",
            }[os.environ["LAYER"]],
            "CONFIG": {"hosts": [os.environ["HEADWAY_REDIS_URL"]]},
        }
    }
)
django.setup()


class Follower(AsyncJsonWebsocketConsumer):
    """Sends what its group is sent."""

    groups = ("job",)

    async def job_event(self, event):
        await self.send_json(event["frame"])


async def lifespan(scope, receive, send):
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


application = ProtocolTypeRouter({"websocket": URLRouter([path("ws", Follower.as_asgi())]), "lifespan": lifespan})
