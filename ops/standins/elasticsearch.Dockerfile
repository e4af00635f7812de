FROM headrace-standin-java
RUN useradd --uid 1000 --gid 0 --home-dir /usr/share/elasticsearch elasticsearch
COPY artifact /usr/share/elasticsearch
COPY standins/elasticsearch /opt/standin
RUN cp /opt/standin/jvm.options /opt/standin/log4j2.properties /usr/share/elasticsearch/config/ \
    && cp /opt/standin/entrypoint.sh /usr/local/bin/docker-entrypoint.sh && chmod +x /usr/local/bin/docker-entrypoint.sh \
    && echo 'network.host: 0.0.0.0' > /usr/share/elasticsearch/config/elasticsearch.yml \
    && mkdir -p /usr/share/elasticsearch/data /usr/share/elasticsearch/logs \
    && chown -R elasticsearch:root /usr/share/elasticsearch
ENV ES_JAVA_HOME=/opt/java
USER elasticsearch
WORKDIR /usr/share/elasticsearch
VOLUME /usr/share/elasticsearch/data
LABEL headrace.standin=elasticsearch
ENTRYPOINT ["docker-entrypoint.sh"]
