# `docker build -t aep-batch-gateway .` gives an image with one static binary, a
# CA bundle and nothing else. deploy/image/test.sh builds and runs it.

FROM docker.io/library/rust:1.95-bookworm AS build
WORKDIR /build

# `--build-arg PROFILE=gateway.profdata` builds with a profile: how often each function and
# branch is used. `bench/run.sh --profile` records it into deploy/image, for just these versions
# of Rust and of the dependencies. It saves a fifth of a call's processor time.
ARG PROFILE=
COPY deploy/image /profiles
# Linked with glibc's static libraries, because the final image has no libraries.
# What a profile shows to be hardly used is cut out of its functions and laid aside.
# Build scripts are not touched by this, as long as --target is given.
ENV RUSTFLAGS="-Ctarget-feature=+crt-static ${PROFILE:+-Cprofile-use=/profiles/$PROFILE -Cllvm-args=-enable-split-machine-functions -Clink-arg=-Wl,-z,keep-text-section-prefix}"

# The dependencies first, with empty sources: this layer lasts until Cargo.toml
# or Cargo.lock changes.
COPY Cargo.toml Cargo.lock ./
COPY simulator/Cargo.toml simulator/
RUN mkdir src simulator/src \
    && touch src/lib.rs simulator/src/lib.rs \
    && echo 'fn main() {}' > src/main.rs \
    && cp src/main.rs build.rs \
    && cargo build --release --locked --target "$(rustc --print host-tuple)"

COPY build.rs ./
COPY proto proto
COPY simulator simulator
COPY src src
# COPY keeps the age of files, and cargo builds only what is newer than its last build.
RUN touch build.rs src/lib.rs src/main.rs simulator/src/lib.rs \
    && cargo build --release --locked --target "$(rustc --print host-tuple)" \
    && cp target/*/release/aep-batch-gateway /

FROM scratch
LABEL org.opencontainers.image.title="aep-batch-gateway" \
      org.opencontainers.image.description="A gRPC gateway for the batch ingestion REST API of Adobe Experience Platform" \
      org.opencontainers.image.licenses="Apache-2.0"

# Whom the gateway trusts where it speaks TLS with the API.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY LICENSE /
COPY --from=build /aep-batch-gateway /

# A number, because Kubernetes' runAsNonRoot cannot check a name.
USER 65532:65532
# The program's own defaults are loopback addresses, which nobody reaches in a container.
ENV AEP_GATEWAY_LISTEN=0.0.0.0:50051 \
    AEP_GATEWAY_ADMIN_LISTEN=0.0.0.0:9464
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
# There is no shell here: the program asks itself. It gives up after 3 seconds.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5s \
    CMD ["/aep-batch-gateway", "healthcheck"]
ENTRYPOINT ["/aep-batch-gateway"]
CMD ["serve"]
