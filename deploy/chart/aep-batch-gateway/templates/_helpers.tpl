{{- define "gateway.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What the Service, the PodDisruptionBudget and the NetworkPolicy find the pods by. */}}
{{- define "gateway.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Of the test's pod. Not the gateway's: the Service must not send calls there. */}}
{{- define "gateway.testSelector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}-test
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "gateway.metadata" -}}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "gateway.labels" -}}
{{ include "gateway.selector" . }}
{{ include "gateway.metadata" . }}
{{- end -}}

{{- define "gateway.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "gateway.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ include "gateway.fullname" . }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end -}}
{{- end -}}

{{/* The schema has seen that durations which are computed with end in s. */}}
{{- define "gateway.seconds" -}}
{{ trimSuffix "s" . | int }}
{{- end -}}

{{/* What one value cannot say without another; the schema cannot compare them. */}}
{{- define "gateway.check" -}}
{{- $request := include "gateway.seconds" .Values.settings.requestTimeout | int -}}
{{- $drain := include "gateway.seconds" .Values.settings.drainTimeout | int -}}
{{- if ge $request $drain -}}
{{- fail (printf "settings.drainTimeout (%ds) must be more than settings.requestTimeout (%ds): else a pod that ends cuts off requests that still run" $drain $request) -}}
{{- end -}}
{{- $least := add (include "gateway.seconds" .Values.settings.drainDelay | int) $drain 2 | int -}}
{{- $grace := include "gateway.gracePeriod" . | int -}}
{{- if lt $grace $least -}}
{{- fail (printf "terminationGracePeriodSeconds (%d) must be at least %d: drainDelay + drainTimeout + 2; else the pod is killed while calls are in flight" $grace $least) -}}
{{- end -}}
{{- with .Values.defaultCredentials -}}
{{- if and (or .tokenKey .apiKeyKey) (not .secretName) -}}
{{- fail "defaultCredentials.tokenKey and apiKeyKey need defaultCredentials.secretName" -}}
{{- end -}}
{{- if and .secretName (not .tokenKey) (not .apiKeyKey) -}}
{{- fail "defaultCredentials.secretName needs defaultCredentials.tokenKey or apiKeyKey" -}}
{{- end -}}
{{- if and .tokenKey (not .callersAreAuthenticated) (not $.Values.tls.allowedClients) -}}
{{- fail "defaultCredentials.tokenKey lets whoever reaches the gateway act with that token: let in tls.allowedClients only, or say defaultCredentials.callersAreAuthenticated if something checks callers" -}}
{{- end -}}
{{- end -}}
{{- with .Values.tls -}}
{{- if and .clientCaSecretName (not .secretName) -}}
{{- fail "tls.clientCaSecretName needs tls.secretName" -}}
{{- end -}}
{{- if and .allowedClients (not .clientCaSecretName) -}}
{{- fail "tls.allowedClients needs tls.clientCaSecretName: without it nobody has to show a certificate" -}}
{{- end -}}
{{- if and .secretName $.Values.probes.grpc -}}
{{- fail "probes.grpc cannot be used with tls: kubelet speaks no TLS in its gRPC probe" -}}
{{- end -}}
{{- end -}}
{{- with .Values.autoscaling -}}
{{- if and .enabled (lt (int .maxReplicas) (int .minReplicas)) -}}
{{- fail "autoscaling.maxReplicas must not be less than autoscaling.minReplicas" -}}
{{- end -}}
{{- end -}}
{{- range .Values.extraEnv -}}
{{- if hasPrefix "AEP_GATEWAY_" .name -}}
{{- fail (printf "extraEnv: %s is set by other values" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "gateway.gracePeriod" -}}
{{- if kindIs "invalid" .Values.terminationGracePeriodSeconds -}}
{{ add (include "gateway.seconds" .Values.settings.drainDelay | int) (include "gateway.seconds" .Values.settings.drainTimeout | int) 5 }}
{{- else -}}
{{ .Values.terminationGracePeriodSeconds | int }}
{{- end -}}
{{- end -}}

{{/* Native sidecars (Kubernetes 1.29) start before the gateway and end after it, so
that calls in flight still reach Adobe while a pod ends. The admin port stays out
of the mesh: kubelet and a Prometheus without sidecar read it. So Istio must not send
either to port 15020 of its own, which has not the gateway's metrics. But gRPC probes
would ask a port of the mesh, which wants mTLS: those Istio must rewrite. */}}
{{- define "gateway.meshAnnotations" -}}
{{- if eq .Values.mesh "istio" -}}
sidecar.istio.io/nativeSidecar: "true"
traffic.sidecar.istio.io/excludeInboundPorts: "9464"
prometheus.istio.io/merge-metrics: "false"
{{- if not .Values.probes.grpc }}
sidecar.istio.io/rewriteAppHTTPProbers: "false"
{{- end }}
{{- else if eq .Values.mesh "linkerd" -}}
linkerd.io/inject: enabled
config.beta.linkerd.io/proxy-enable-native-sidecar: "true"
config.linkerd.io/skip-inbound-ports: "9464"
{{- end -}}
{{- end -}}

{{- define "gateway.meshLabels" -}}
{{- if eq .Values.mesh "istio" -}}
sidecar.istio.io/inject: "true"
{{- else if eq .Values.mesh "istio-ambient" -}}
istio.io/dataplane-mode: ambient
{{- end -}}
{{- end -}}

{{- define "gateway.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* The image's user has a number for this. */}}
{{- define "gateway.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
# Secrets are mounted for the group only.
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}
