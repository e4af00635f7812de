FROM headrace-standin-base
RUN apt-get update -q && apt-get install -qy --no-install-recommends redis-server && rm -rf /var/lib/apt/lists/*
RUN mkdir /data && chown redis:redis /data
COPY standins/redis-entrypoint.sh /usr/local/bin/docker-entrypoint.sh
VOLUME /data
WORKDIR /data
LABEL headrace.standin=redis
ENTRYPOINT ["docker-entrypoint.sh"]
CMD ["redis-server"]
