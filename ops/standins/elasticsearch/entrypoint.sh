#!/bin/bash
# As the official image: variables with a dot are settings, and ELASTIC_PASSWORD is the first password of `elastic`.
set -e
settings=()
while IFS= read -r line; do
    settings+=("-E$line")
done < <(env | grep -E '^[a-z0-9_]+\.[a-z0-9_.]+=')
[ -e config/elasticsearch.keystore ] || bin/elasticsearch-keystore create
printf '%s' "$ELASTIC_PASSWORD" | bin/elasticsearch-keystore add --force --stdin bootstrap.password
exec bin/elasticsearch "${settings[@]}"
