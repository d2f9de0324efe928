{{/* The spec of the RayCluster, which stays by itself or belongs to a RayJob. */}}
{{- define "poise.cluster" -}}
{{- if not (or .Values.workers.cpu.enabled .Values.workers.gpu.enabled) }}
{{- fail "the head carries no workers: enable workers.cpu or workers.gpu" }}
{{- end }}
{{- $most := 0 }}
{{- range .Values.workers }}{{ if .enabled }}{{ $most = max $most (int64 .minReplicas) }}{{ end }}{{ end }}
{{- if and (not .Values.autoscaler.enabled) (not (include "poise.queued" .)) (eq (int64 $most) 0) }}
{{- fail "without the autoscaler nothing starts workers: set minReplicas of workers.cpu or workers.gpu" }}
{{- end }}
rayVersion: {{ .Values.rayVersion | quote }}
authOptions:
  mode: {{ .Values.auth.mode }}
  {{- with .Values.auth.secretName }}
  secretName: {{ . | quote }}
  {{- end }}
{{- $autoscaled := include "poise.autoscaled" . }}
enableInTreeAutoscaling: {{ not (empty $autoscaled) }}
{{- if $autoscaled }}
autoscalerOptions:
  idleTimeoutSeconds: {{ int64 .Values.autoscaler.idleTimeoutSeconds }}
  upscalingMode: {{ .Values.autoscaler.upscalingMode }}
  securityContext:
    {{- include "poise.security.container" . | nindent 4 }}
{{- end }}
headGroupSpec:
  serviceType: ClusterIP
  rayStartParams:
    num-cpus: "0"
  template:
    {{- include "poise.node" (dict "root" . "name" "head" "group" .Values.head) | nindent 4 }}
workerGroupSpecs:
  {{- range $name, $group := .Values.workers }}
  {{- if $group.enabled }}
  {{- if gt (int $group.minReplicas) (int $group.maxReplicas) }}
  {{- fail (printf "workers.%s: minReplicas %v is above maxReplicas %v" $name $group.minReplicas $group.maxReplicas) }}
  {{- end }}
  {{- $least := ternary $group.maxReplicas $group.minReplicas (not (empty (include "poise.queued" $))) }}
  - groupName: {{ $name }}
    replicas: {{ int64 $least }}
    minReplicas: {{ int64 $least }}
    maxReplicas: {{ int64 $group.maxReplicas }}
    rayStartParams: {}
    template:
      {{- include "poise.node" (dict "root" $ "name" $name "group" $group) | nindent 6 }}
  {{- end }}
  {{- end }}
{{- end }}

{{/* The pod of one Ray node: root, name of the group, its values. */}}
{{- define "poise.node" -}}
{{- $head := eq .name "head" -}}
{{- $job := and $head .root.Values.job.enabled -}}
metadata:
  labels:
    {{- include "poise.selector" .root | nindent 4 }}
spec:
  {{- include "poise.pod" .root | nindent 2 }}
  {{- if not (and $head (include "poise.autoscaled" .root)) }}
  automountServiceAccountToken: false
  {{- end }}
  {{- with .group.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations:
    {{- range . }}
    {{- $seconds := dict }}
    {{- if hasKey . "tolerationSeconds" }}{{ $seconds = dict "tolerationSeconds" (int64 .tolerationSeconds) }}{{ end }}
    - {{- mustMergeOverwrite (deepCopy .) $seconds | toYaml | nindent 6 }}
    {{- end }}
  {{- end }}
  containers:
    - name: ray
      image: {{ .group.image | default (include "poise.image" .root) }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      securityContext:
        {{- include "poise.security.container" .root | nindent 8 }}
      {{- include "poise.environment" .root | nindent 6 }}
      ports:
        {{- if $head }}
        - name: gcs-server
          containerPort: 6379
        - name: dashboard
          containerPort: 8265
        - name: client
          containerPort: 10001
        {{- end }}
        {{- if $job }}
        - name: driver-metrics
          containerPort: 9464
        {{- end }}
        - name: metrics
          containerPort: 8080
      resources:
        {{- $resources := dict "cpu" (include "poise.number" .group.cpus) "memory" .group.memory }}
        {{- with .group.gpus }}
        {{- $_ := set $resources "nvidia.com/gpu" (toString (int64 .)) }}
        {{- end }}
        requests:
          {{- toYaml $resources | nindent 10 }}
        limits:
          {{- toYaml $resources | nindent 10 }}
      volumeMounts:
        - name: shm
          mountPath: /dev/shm
        {{- if .root.Values.sharedVolume.claimName }}
        - name: shared
          mountPath: {{ .root.Values.sharedVolume.mountPath | quote }}
        {{- end }}
        {{- if and $job .root.Values.job.spec }}
        - name: spec
          mountPath: /etc/poise
          readOnly: true
        {{- end }}
  volumes:
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ .group.shm }}
    {{- with .root.Values.sharedVolume.claimName }}
    - name: shared
      persistentVolumeClaim:
        claimName: {{ . | quote }}
    {{- end }}
    {{- if and $job .root.Values.job.spec }}
    - name: spec
      configMap:
        name: {{ include "poise.name" .root }}-spec
    {{- end }}
{{- end }}

{{/* A number as people write it: Helm reads all of them as floating point, and would print 1e+06. */}}
{{- define "poise.number" -}}
{{- if eq (float64 .) (float64 (int64 .)) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end }}

{{- define "poise.environment" -}}
env:
  {{- /* What poise.env sets for Ray's own processes; the rest is set by the driver. */}}
  - {name: RAY_worker_niceness, value: "0"}
  - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
  {{- with .Values.s3.region }}
  - name: AWS_DEFAULT_REGION
    value: {{ . | quote }}
  {{- end }}
  {{- with .Values.s3.endpoint }}
  - name: AWS_ENDPOINT_URL
    value: {{ . | quote }}
  {{- end }}
  {{- range $name, $value := .Values.environment }}
  - name: {{ $name | quote }}
    value: {{ $value | quote }}
  {{- end }}
{{- with .Values.s3.secretName }}
envFrom:
  - secretRef:
      name: {{ . | quote }}
{{- end }}
{{- end }}
