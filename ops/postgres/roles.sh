#!/bin/sh
# Run once by the image of postgres, when it has made an empty database: the role of capture and verify.
# `headrace setup --role headrace` gives it what it needs, and no more.
psql -v ON_ERROR_STOP=1 -v password="$CAPTURE_PASSWORD" --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
CREATE ROLE headrace LOGIN PASSWORD :'password';
SQL
