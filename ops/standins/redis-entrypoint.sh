#!/bin/sh
# As the official image: the server runs as redis and owns its folder; it is reached from outside.
set -e
if [ "$1" = redis-server ] && [ "$(id -u)" = 0 ]; then
    find . \! -user redis -exec chown redis '{}' +
    exec setpriv --reuid=redis --regid=redis --clear-groups "$0" "$@"
fi
exec "$@" --bind '*' --protected-mode no
