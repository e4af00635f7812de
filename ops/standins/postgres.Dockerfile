FROM headrace-standin-base
RUN apt-get update -q && apt-get install -qy --no-install-recommends postgresql-client && rm -rf /var/lib/apt/lists/*
RUN id postgres 2>/dev/null || useradd --system --uid 999 --user-group --home-dir /var/lib/postgresql postgres
RUN mkdir -p /var/lib/postgresql /var/run/postgresql /docker-entrypoint-initdb.d \
    && chown -R postgres:postgres /var/lib/postgresql /var/run/postgresql
COPY artifact /usr/local/pgsql
COPY standins/postgres-entrypoint.sh /usr/local/bin/docker-entrypoint.sh
ENV PATH=/usr/local/pgsql/bin:$PATH PGDATA=/var/lib/postgresql/18/docker
VOLUME /var/lib/postgresql
STOPSIGNAL SIGINT
LABEL headrace.standin=postgres
ENTRYPOINT ["docker-entrypoint.sh"]
CMD ["postgres"]
