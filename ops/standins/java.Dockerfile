FROM headrace-standin-base
COPY artifact /opt/java
ENV JAVA_HOME=/opt/java PATH=/opt/java/bin:$PATH
