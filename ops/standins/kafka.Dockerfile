FROM headrace-standin-java
RUN useradd --uid 1000 --user-group --create-home appuser
COPY artifact /opt/kafka
COPY standins/kafka /opt/standin
RUN mkdir -p /opt/kafka/config /opt/kafka/bin /var/lib/kafka/data /etc/kafka/docker /mnt/shared/config \
    && cp /opt/standin/run /etc/kafka/docker/run && cp /opt/standin/*.sh /opt/kafka/bin/ \
    && cp /opt/standin/log4j2.yaml /etc/kafka/docker/log4j2.yaml && cp /opt/standin/log4j2.yaml /etc/kafka/docker/tools-log4j2.yaml \
    && touch /etc/kafka/docker/server.properties \
    && chmod +x /etc/kafka/docker/run /opt/kafka/bin/*.sh \
    && chown -R appuser:appuser /opt/kafka /var/lib/kafka /etc/kafka /mnt/shared/config
USER appuser
VOLUME /var/lib/kafka/data
LABEL headrace.standin=kafka
CMD ["/etc/kafka/docker/run"]
